"""Makes the files beside it with PyTorch: whole tiny BLIP-2 checkpoints as Hugging Face saves them, and what they compute.

    pip install torch==2.13.0 transformers==4.57.6
    python make_reference.py

The models compute in float64 from weights that float32 holds exactly, so that what a comparison finds is only our rounding.
Gradients are stored under blip2x's names and layouts: a linear layer is [in, out] here and [out, in] in PyTorch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.activations import ACT2FN

HERE = Path(__file__).parent
# No two widths are equal, so a missed transpose fits in square matrices only, and there the numbers show it.
VISION = {"image_size": 15, "patch_size": 5, "hidden_size": 16, "intermediate_size": 26}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 18, "intermediate_size": 34, "num_hidden_layers": 3, "num_attention_heads": 3}
QFORMER |= {"vocab_size": 37, "max_position_embeddings": 12}
OPT = {"hidden_size": 15, "word_embed_proj_dim": 15, "ffn_dim": 28, "num_hidden_layers": 2, "num_attention_heads": 3}
OPT |= {"vocab_size": 41, "max_position_embeddings": 24}
T5 = {"d_model": 14, "d_kv": 5, "num_heads": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "vocab_size": 43}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
QUERIES, EMBED_DIM, LARGER = 5, 11, 25
OPT_PAD, T5_PAD = 1, 0
SMALL = 0.01  # scale of what the vision tower adds up: its square is near the norms' epsilons, so another one shows
TRAINED = ("vision_model.post_layernorm.", "query_tokens", "qformer.", "language_projection.")
RENAMES = [  # of what is trained, in this order
    ("vision_model.post_layernorm", "ln_vision"),
    ("qformer.layernorm", "qformer.embeddings_norm"),
    ("qformer.encoder.layer.", "qformer.layers."),
    ("crossattention.attention.", "cross_attention."),
    ("crossattention.output.dense", "cross_attention.out"),
    ("crossattention.output.LayerNorm", "cross_attention.norm"),
    ("attention.attention.", "attention."),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "attention.norm"),
    ("intermediate_query.dense", "query_ffn.fc1"),
    ("output_query.dense", "query_ffn.fc2"),
    ("output_query.LayerNorm", "query_ffn.norm"),
    ("language_projection", "language_proj"),
]
generator = torch.Generator().manual_seed(0)

Arrays = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def random_ids(first: int, last: int, *shape: int) -> Tensor:
    return torch.randint(first, last, shape, generator=generator)


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Everything random, query tokens and the biases of keys too; attention is neither flat nor sharp."""
    for name, parameter in model.named_parameters():
        if name == "query_tokens":
            parameter.copy_(0.02 * random(*parameter.shape))  # as BERT draws them: the first norm's epsilon counts
        elif parameter.ndim < 2:
            parameter.copy_(0.3 * random(*parameter.shape) + ("norm" in name.lower() and name.endswith("weight")))
        elif "embed" in name and parameter.ndim < 4:
            parameter.copy_(0.3 * random(*parameter.shape))
        else:
            parameter.copy_(parameter[0].numel() ** -0.5 * random(*parameter.shape))
        if name.startswith("vision_model.") and any(part in name for part in ("embedding", "projection", "fc2")):
            parameter.mul_(SMALL)


def save(model: PreTrainedModel, folder: str, *, dtype: torch.dtype = torch.float32, **options) -> None:
    """As Hugging Face saves a model that it holds in `dtype`; reading it back gives the same tensors."""
    shutil.rmtree(HERE / folder, ignore_errors=True)
    model.save_pretrained(HERE / folder, **options)
    again = type(model).from_pretrained(HERE / folder, dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    for file in (HERE / folder).iterdir():
        file.chmod(0o644)


def config(text: PretrainedConfig | None = None, image_token: int | None = None) -> Blip2Config:
    return Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": text is None},
        text_config=None if text is None else text.to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=EMBED_DIM,
        image_token_index=image_token,
        attn_implementation="eager",
    )


def generative(text: PretrainedConfig, folder: str, **options) -> Blip2ForConditionalGeneration:
    """The image token is the vocabulary's last."""
    model = Blip2ForConditionalGeneration._from_config(config(text, text.vocab_size - 1), attn_implementation="eager").eval()
    enliven(model)
    save(model, folder, **options)
    return model


def encode(model: PreTrainedModel, image: Tensor, **options) -> Arrays:
    """What the tower's last block, the norm behind it and the Q-Former give."""
    kept = {}
    hook = model.vision_model.encoder.register_forward_hook(lambda _, __, out: kept.update(vision=out.last_hidden_state))
    kept["patches"] = model.vision_model(image, **options).last_hidden_state
    hook.remove()
    tokens = model.query_tokens.expand(len(image), -1, -1)
    kept["queries"] = model.qformer(query_embeds=tokens, encoder_hidden_states=kept["patches"]).last_hidden_state
    return kept


def with_image_tokens(model: Blip2ForConditionalGeneration, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Hugging Face puts the queries in place of image tokens; in front of the text these are our prefix [queries][text]."""
    places = torch.full((len(ids), QUERIES), model.config.image_token_index)
    return {
        "input_ids": torch.cat([places, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1),
    }


def opt_outputs(model: Blip2ForConditionalGeneration, image: Tensor, texts: Arrays) -> Arrays:
    label = torch.where(texts["opt_label_mask"] == 1, texts["opt_ids"], -100)
    label = torch.cat([torch.full((len(label), QUERIES), -100), label], dim=1)
    out = model(image, **with_image_tokens(model, texts["opt_ids"], texts["opt_mask"]), labels=label)
    return {"logits": out.logits, "loss": out.loss}


def t5_outputs(model: Blip2ForConditionalGeneration, image: Tensor, texts: Arrays) -> Arrays:
    label = torch.where(texts["t5_output_mask"] == 1, texts["t5_output_ids"], -100)
    out = model(image, **with_image_tokens(model, texts["t5_input_ids"], texts["t5_input_mask"]), labels=label)
    return {"logits": out.logits, "loss": out.loss}


def retrieval_outputs(model: Blip2ForImageTextRetrieval, image: Tensor, texts: Arrays) -> Arrays:
    ids, mask = texts["ids"], texts["mask"]
    contrast = model(image, ids, mask)
    match = model(image[texts["itm_image"]], ids, mask, use_image_text_matching_head=True)
    return {
        "image_vectors": contrast.image_embeds,
        "text_vectors": contrast.text_embeds,
        "itc": contrast.logits_per_image,
        "itm": match.logits_per_image,
    }


def gradients(model: nn.Module, loss: Tensor) -> Arrays:
    """Of all that stage 2 trains, by our names."""
    named = {name: parameter for name, parameter in model.named_parameters() if name.startswith(TRAINED)}
    found = torch.autograd.grad(loss, list(named.values()))
    return {our_name(name): g.T if g.ndim == 2 else g for name, g in zip(named, found, strict=True)}


def our_name(name: str) -> str:
    if name == "query_tokens":
        return "qformer.query_tokens"
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    return name


def mask(width: int, *lengths: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def batch() -> Arrays:
    """Three images and texts of unequal lengths, padded on the right; some begin with a prompt, which is no target."""
    image, larger = random(3, 3, VISION["image_size"], VISION["image_size"]), random(2, 3, LARGER, LARGER)
    arrays = {"image": image, "larger_image": larger}
    opt_mask, label_mask = mask(7, 7, 4, 6), 1 - mask(7, 0, 1, 3)
    opt_ids = random_ids(3, OPT["vocab_size"] - 1, 3, 7)
    arrays |= {"opt_ids": torch.where(opt_mask == 1, opt_ids, OPT_PAD), "opt_mask": opt_mask}
    arrays |= {"opt_label_mask": label_mask * opt_mask}
    for name, part_mask in (("input", mask(6, 3, 6, 1)), ("output", mask(5, 5, 2, 4))):
        ids = random_ids(2, T5["vocab_size"] - 1, *part_mask.shape)
        arrays |= {f"t5_{name}_ids": torch.where(part_mask == 1, ids, T5_PAD), f"t5_{name}_mask": part_mask}
    text_mask = mask(8, 8, 3, 6, 2)  # one text more than images: which axis is which shows
    ids = random_ids(1, QFORMER["vocab_size"], 4, 8) * text_mask
    return arrays | {"ids": ids, "mask": text_mask, "itm_image": torch.tensor([0, 1, 2, 0])}


def twice(name: str, model: nn.Module, compute) -> Arrays:
    """`compute(model, double)` in float64; prints how far PyTorch's float32 is from it."""
    single = compute(model.float(), torch.float32)
    # T5's norms, and the softmax of T5 and OPT, ask for float32 whatever the model's type is
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        out = compute(model.double(), torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in out.values())
    for key, tensor in out.items():
        if "gradient" not in key:
            noise = (single[key] - tensor).abs().max()
            print(f"{name}.{key}: up to {tensor.abs().max():.2f}, PyTorch's rounding in float32 {noise:.0e}")
    if grown := [key for key in out if "gradient" in key]:
        noise, largest = max((single[k] - out[k]).abs().max() for k in grown), max(out[k].abs().max() for k in grown)
        print(f"{name}: {len(grown)} gradients up to {largest:.2f}, PyTorch's rounding in float32 {noise:.0e}")
    return {f"{name}.{key}": tensor.detach() for key, tensor in out.items()}


def main() -> None:
    arrays = batch()
    opt = generative(OPTConfig(**OPT), "opt", max_shard_size="40KB")
    t5 = generative(T5Config(**T5), "t5")
    retrieval = Blip2ForImageTextRetrieval._from_config(config(), attn_implementation="eager").eval()
    enliven(retrieval)
    save(retrieval, "retrieval")
    # Hugging Face leaves the Q-Former of a float16 model in float32
    for kind, source, folder, dtype in (
        (Blip2ForConditionalGeneration, "opt", "opt_bfloat16", torch.bfloat16),
        (Blip2ForImageTextRetrieval, "retrieval", "retrieval_float16", torch.float16),
    ):
        half = kind.from_pretrained(HERE / source, dtype=dtype, attn_implementation="eager")
        save(half, folder, dtype=dtype, safe_serialization=dtype == torch.bfloat16)

    def images(model: nn.Module, dtype: torch.dtype) -> Arrays:
        return encode(model, arrays["image"].to(dtype))

    def larger_images(model: nn.Module, dtype: torch.dtype) -> Arrays:
        return encode(model, arrays["larger_image"].to(dtype), interpolate_pos_encoding=True)

    def stage2(outputs, model: nn.Module, dtype: torch.dtype) -> Arrays:
        image = arrays["image"].to(dtype)
        out = outputs(model, image, arrays)
        found = {f"gradient.{name}": gradient for name, gradient in gradients(model, out["loss"]).items()}
        return {**out, "projected": model.get_image_features(image), **found}

    for name, model in (("opt", opt), ("t5", t5), ("retrieval", retrieval)):
        arrays |= twice(name, model, images)
    arrays |= twice("opt_larger", opt, larger_images)
    arrays |= twice("opt", opt, lambda *args: stage2(opt_outputs, *args))
    arrays |= twice("t5", t5, lambda *args: stage2(t5_outputs, *args))
    for layer in t5.modules():
        if type(layer).__name__ == "T5DenseGatedActDense":
            layer.act = ACT2FN["gelu"]
    arrays |= twice("t5_exact", t5, lambda *args: stage2(t5_outputs, *args))
    arrays |= twice("retrieval", retrieval, lambda model, dtype: retrieval_outputs(model, arrays["image"].to(dtype), arrays))
    stored = {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}
    np.savez_compressed(
        HERE / "reference.npz", **{n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in stored.items()}
    )


if __name__ == "__main__":
    main()
