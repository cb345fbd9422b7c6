"""From our names and layout back to a Hugging Face BLIP-2 repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blip2x.config.model import Activation, ModelConfig, OptConfig, T5Config
from blip2x.errors import UserError
from blip2x.models.weights.names.huggingface import HUGGINGFACE
from blip2x.models.weights.names.table import Change
from blip2x.models.weights.stored import StoredTensor, size_of
from blip2x.models.weights.write import write_safetensors

_NO_PLACE = {  # how our name starts -> why Hugging Face's models lack it
    "temp": "Hugging Face's models do not train the contrast",
    "qformer.text.head_": "Hugging Face's Q-Former writes no captions",
}
_STAGE1_ONLY = re.compile(r"(qformer\.text\.|qformer\.layers\.\d+\.text_ffn\.|vision_proj\.|text_proj\.|itm_head\.)")
_BIAS = re.compile(r"(vision\.blocks\.\d+\.attention\.)(query|value)_bias")
# The first row behind the tokenizer's, as in Hugging Face's own repositories. A model without such rows has OPT's <s>, which no
# BLIP-2 reads, stand for images, and T5's <unk>
_IMAGE_TOKEN = {"opt": 50265, "t5": 32100}
_SPARE_TOKEN = {"opt": 0, "t5": 2}
_LINE_BREAK = 50118  # where OPT's texts end


def to_huggingface(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors under Hugging Face's names, and those that have no place there, with the reason.

    Raises:
        UserError: a part that Hugging Face's BLIP-2 has not: CLIP's image encoder, or what reads questions in stage 2.
    """
    if "vision.norm.weight" in tensors:
        raise UserError("Hugging Face's BLIP-2 has no CLIP image encoder, so this model cannot go there; use task.to=blip2x")
    is_stage2 = any(name.startswith("language_proj.") for name in tensors)
    if is_stage2 and "qformer.text.word_embeddings.weight" in tensors:
        raise UserError(
            "Hugging Face's BLIP-2 has no Q-Former that reads questions, so this model cannot go there; use task.to=blip2x"
        )
    found: dict[str, StoredTensor] = {}
    left: dict[str, str] = {}
    for name, tensor in tensors.items():
        if match := _BIAS.fullmatch(name):
            if match[2] == "query":
                found[_theirs(f"{match[1]}qkv.bias")[0]] = _packed(tensor, tensors[f"{match[1]}value_bias"])
            continue
        reason = next((why for start, why in _NO_PLACE.items() if name.startswith(start)), None)
        if reason is None and is_stage2 and _STAGE1_ONLY.match(name):
            reason = "only stage 1 uses it"
        if reason is not None:
            left[name] = reason
            continue
        theirs, change = _theirs(name)
        found[theirs] = tensor.changed(tensor.shape[::-1], np.transpose) if change is Change.transpose else tensor
    return found, left


def _theirs(name: str) -> tuple[str, Change]:
    found = HUGGINGFACE.to_theirs(name)
    if found is None:
        raise UserError(f"Hugging Face's BLIP-2 has no place for {name}; use task.to=blip2x")
    return found


def _packed(query: StoredTensor, value: StoredTensor) -> StoredTensor:
    """Biases of queries, keys and values; the keys' are zero."""
    width = query.shape[0]

    def read() -> np.ndarray:
        first, last = query.read(), value.read()
        return np.concatenate([first, np.zeros_like(first), last])

    return StoredTensor(query.where, (3 * width,), query.dtype, read)


def huggingface_config(
    cfg: ModelConfig, tensors: Mapping[str, StoredTensor], *, end: int, pad: int, image: int | None = None
) -> dict[str, Any]:
    """A config.json for tensors (by our names) of a model of `cfg`.

    `end`, `pad` and `image` are tokens of the language model; `image`, which stands where the queries go, is the one that
    Hugging Face's processor adds behind the tokenizer's own. None: as in the published models.
    """
    is_stage2 = "language_proj.weight" in tensors
    grid = round((tensors["vision.embeddings.positions"].shape[1] - 1) ** 0.5)
    reads_text = "qformer.text.word_embeddings.weight" in tensors and not is_stage2
    config: dict[str, Any] = {
        "architectures": ["Blip2ForConditionalGeneration" if is_stage2 else "Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "num_query_tokens": cfg.qformer.num_queries,
        "image_text_hidden_size": cfg.qformer.embed_dim,
        "initializer_range": 0.02,
        "use_decoder_only_language_model": isinstance(cfg.language, OptConfig),
        "dtype": str(tensors["qformer.query_tokens"].dtype),
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": cfg.vision.width,
            "intermediate_size": cfg.vision.mlp_width,
            "num_hidden_layers": cfg.vision.depth,
            "num_attention_heads": cfg.vision.num_heads,
            "image_size": grid * cfg.vision.patch_size,
            "patch_size": cfg.vision.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": tensors["qformer.text.word_embeddings.weight"].shape[0] if reads_text else 30522,
            "hidden_size": cfg.qformer.width,
            "num_hidden_layers": cfg.qformer.depth,
            "num_attention_heads": cfg.qformer.num_heads,
            "intermediate_size": cfg.qformer.mlp_width,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": cfg.qformer.max_positions,
            "position_embedding_type": "absolute",
            "cross_attention_frequency": cfg.qformer.cross_attention_every,
            "encoder_hidden_size": cfg.vision.width,
            "use_qformer_text_input": reads_text,
        },
    }
    if is_stage2:
        config["text_config"] = _text_config(cfg, tensors, end=end, pad=pad)
        token = _IMAGE_TOKEN[cfg.language.kind] if image is None else image
        fits = token < config["text_config"]["vocab_size"]
        config["image_token_index"] = token if fits else _SPARE_TOKEN[cfg.language.kind]
    return config


def _text_config(cfg: ModelConfig, tensors: Mapping[str, StoredTensor], *, end: int, pad: int) -> dict[str, Any]:
    language = cfg.language
    if isinstance(language, OptConfig):
        return {
            "model_type": "opt",
            "vocab_size": tensors["language.opt.embeddings.word_embeddings.weight"].shape[0],
            "hidden_size": language.width,
            "word_embed_proj_dim": language.width,
            "num_hidden_layers": language.depth,
            "num_attention_heads": language.num_heads,
            "ffn_dim": language.mlp_width,
            "max_position_embeddings": language.max_positions,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "dropout": language.dropout,
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": end,
            "pad_token_id": pad,
            "tie_word_embeddings": True,
        }
    if not isinstance(language, T5Config):
        raise UserError(f"Hugging Face's BLIP-2 has no language model of kind {language.kind}; use task.to=blip2x")
    return {
        "model_type": "t5",
        "vocab_size": tensors["language.shared.weight"].shape[0],
        "d_model": language.width,
        "d_kv": language.head_width,
        "d_ff": language.mlp_width,
        "num_layers": language.encoder_depth,
        "num_decoder_layers": language.decoder_depth,
        "num_heads": language.num_heads,
        "relative_attention_num_buckets": language.relative_buckets,
        "relative_attention_max_distance": language.relative_max_distance,
        "dropout_rate": language.dropout,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        # behind feed_forward_proj, which would set the approximation
        "dense_act_fn": "gelu" if language.activation is Activation.gelu else "gelu_new",
        "decoder_start_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": end,
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }


def usual_ends(kind: str, vocab_size: int) -> tuple[int, int]:
    """The tokens that end and pad texts of a language model where nothing says otherwise: as in BLIP-2's published models.

    A small vocabulary, which is none of theirs, has no line break at OPT's place: </s> ends its texts.
    """
    if kind == "opt":
        return (_LINE_BREAK if vocab_size > _LINE_BREAK else 2), 1
    return 1, 0


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_gb: float) -> None:
    """model.safetensors, or several files and their index, as transformers names them."""
    shards: list[dict[str, StoredTensor]] = [{}]
    room = max_gb * 1e9
    for name, tensor in tensors.items():
        if shards[-1] and size_of(tensor) > room:
            shards.append({})
            room = max_gb * 1e9
        shards[-1][name] = tensor
        room -= size_of(tensor)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, {"format": "pt"})
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(size_of(tensor) for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A settings file beside the weights."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
