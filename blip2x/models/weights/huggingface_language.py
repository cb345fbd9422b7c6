"""OPT and T5 from the folder of a Hugging Face repository: each tensor is mapped by name, or left out with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from blip2x.errors import UserError
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.weights.checkpoint import LoadReport
from blip2x.models.weights.tensor_files import StoredTensor, open_tensors, read_json

Table = dict[str, tuple[str, bool]]  # our name -> (the file's name, whether it is transposed)

OPT_TIED = "lm_head.weight"
T5_UNUSED = {
    "encoder.embed_tokens.weight": "the same as shared.weight",
    "decoder.embed_tokens.weight": "the same as shared.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "attention to the encoder has no positions",
}


def is_huggingface_folder(folder: str | Path) -> bool:
    """Whether a folder is laid out as a Hugging Face repository, not as a checkpoint of ours."""
    return (Path(folder) / "config.json").is_file()


def load_huggingface_language(folder: str | Path, model: OptLanguageModel | T5LanguageModel) -> LoadReport:
    """Fill `model` from safetensors or PyTorch files in float32, bfloat16 or float16, tensor by tensor.

    A model built under ``paddle.LazyGuard`` gets its memory here. Nothing is set unless everything fits.

    Raises:
        UserError: the folder has no weights, they are of another model, or names or shapes do not fit; it names them.
    """
    folder = Path(folder)
    if not is_huggingface_folder(folder):
        raise UserError(f"no language model at {folder}: put the files of its Hugging Face repository there, with config.json")
    _check_config(folder, read_json(folder / "config.json"), model)
    stored = open_tensors(folder)
    report = LoadReport(folder)
    table = _t5_table(model) if model.is_encoder_decoder else _opt_table(model, stored, folder)
    _check_names(folder, table, stored, report, model)
    parameters = dict(model.named_parameters())
    for name, (source, transposed) in table.items():
        shape = stored[source].shape[::-1] if transposed else stored[source].shape
        wanted = list(parameters[name].shape)
        if list(shape) != wanted:
            raise UserError(f"{folder}: {source} makes {list(shape)}, but the model's {name} is {wanted}")
    for name, (source, transposed) in table.items():
        array = stored[source].read()
        if not parameters[name]._is_initialized():
            parameters[name].initialize()
        parameters[name].set_value(np.ascontiguousarray(array.T) if transposed else array)
        report.loaded.append(name)
    return report


def _opt_table(model: OptLanguageModel, stored: Iterable[str], folder: Path) -> Table:
    prefix = next((p for p in ("model.decoder.", "decoder.") if p + "embed_tokens.weight" in stored), None)
    if prefix is None:
        raise UserError(f"{folder} has no model.decoder.embed_tokens.weight: it is no OPT")
    table: Table = {
        "opt.embeddings.word_embeddings.weight": (prefix + "embed_tokens.weight", False),
        "opt.embeddings.position_embeddings.weight": (prefix + "embed_positions.weight", False),
    }
    linear = {f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    linear |= {"linear1": "fc1", "linear2": "fc2"}
    norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    for index in range(model.depth):
        ours, theirs = f"opt.decoder.layers.{index}.", f"{prefix}layers.{index}."
        for name, source in {**linear, **norms}.items():
            table[f"{ours}{name}.weight"] = (f"{theirs}{source}.weight", name in linear)
            table[f"{ours}{name}.bias"] = (f"{theirs}{source}.bias", False)
    for kind in ("weight", "bias"):
        table[f"opt.decoder.final_layer_norm.{kind}"] = (f"{prefix}final_layer_norm.{kind}", False)
    return table


def _t5_table(model: T5LanguageModel) -> Table:
    """Names are Hugging Face's; matrices are transposed, since Paddle's Linear is [in, out], but embeddings are not."""
    embeddings = ("shared.weight", "relative_attention_bias.weight")
    return {
        name: (name, len(parameter.shape) == 2 and not name.endswith(embeddings))
        for name, parameter in model.named_parameters()
    }


def _check_names(folder: Path, table: Table, stored: dict[str, StoredTensor], report: LoadReport, model: Any) -> None:
    missing = sorted(source for source, _ in table.values() if source not in stored)
    if missing:
        raise UserError(f"{folder} lacks {_some(missing)}")
    unknown = []
    for name in sorted(stored.keys() - {source for source, _ in table.values()}):
        if name == OPT_TIED and not model.is_encoder_decoder:
            embedding = stored[table["opt.embeddings.word_embeddings.weight"][0]]
            if not np.array_equal(stored[name].read(), embedding.read()):
                raise UserError(f"{folder}: {name} differs from the word embedding, but OPT's head is tied to it")
            report.dropped[name] = "tied to the word embedding"
        elif name in T5_UNUSED and model.is_encoder_decoder:
            report.dropped[name] = T5_UNUSED[name]
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{folder} has tensors that the model lacks: {_some(unknown)}")


def _check_config(folder: Path, config: dict[str, Any], model: OptLanguageModel | T5LanguageModel) -> None:
    """What the shapes of the tensors cannot tell."""
    kind = "t5" if model.is_encoder_decoder else "opt"
    wanted: dict[str, tuple[Any, Any]] = {"model_type": (config.get("model_type"), kind)}  # name -> (theirs, ours)
    if model.is_encoder_decoder:
        wanted |= {
            "num_heads": (config.get("num_heads"), model.num_heads),
            "relative_attention_max_distance": (
                config.get("relative_attention_max_distance", 128),  # files from before it became an option lack it
                model.relative_max_distance,
            ),
            "gated feed_forward_proj": (str(config.get("feed_forward_proj")).startswith("gated-"), True),
            "tie_word_embeddings": (config.get("tie_word_embeddings", True), False),
        }
    else:
        wanted |= {
            "num_attention_heads": (config.get("num_attention_heads"), model.num_heads),
            "do_layer_norm_before": (config.get("do_layer_norm_before", True), True),
            "activation_function": (config.get("activation_function", "relu"), "relu"),
        }
    for name, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise UserError(f"{folder / 'config.json'}: {name} is {theirs!r}, but the configured model has {ours!r}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
