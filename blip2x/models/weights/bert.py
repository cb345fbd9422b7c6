"""A BERT checkpoint (Hugging Face folder) as the start of a Q-Former (BLIP-2, section 3.1).

The queries' feed-forward starts as a copy of the text's; queries, cross-attention and [DEC] stay random.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from paddle import Tensor

from blip2x.errors import UserError
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.weights.checkpoint import LoadReport
from blip2x.models.weights.tensor_files import open_tensors, read_json

# file name (without "bert.") -> ours, "." + weight or bias behind both
_OUTSIDE = {
    "embeddings.LayerNorm": "embeddings_norm",
    "cls.predictions.transform.dense": "text.head_transform",
    "cls.predictions.transform.LayerNorm": "text.head_norm",
}
_IN_LAYER = {
    "attention.self.query": ["attention.query"],
    "attention.self.key": ["attention.key"],
    "attention.self.value": ["attention.value"],
    "attention.output.dense": ["attention.out"],
    "attention.output.LayerNorm": ["attention.norm"],
    "intermediate.dense": ["text_ffn.fc1", "query_ffn.fc1"],
    "output.dense": ["text_ffn.fc2", "query_ffn.fc2"],
    "output.LayerNorm": ["text_ffn.norm", "query_ffn.norm"],
}
_DROPPED = {  # how a name starts -> why it is not used
    "embeddings.token_type_embeddings.": "a caption is one segment",
    "embeddings.position_ids": "counted, not learned",
    "pooler.": "BERT's sentence classifier",
    "cls.seq_relationship.": "BERT's next-sentence head",
    "cls.predictions.decoder.": "tied to the word embeddings",
}
_WORDS, _HEAD_BIAS = "embeddings.word_embeddings.weight", "cls.predictions.bias"


def load_bert(folder: str | Path, qformer: QFormer) -> LoadReport:
    """Set what `qformer` has in common with the BERT in `folder`; nothing is set unless everything fits.

    The vocabulary may have more words than the file's, such as [DEC], whose rows keep their random values. A file without
    the language-model head (``cls.*``) leaves that head random, which the report says.

    Raises:
        UserError: no weights, or names or shapes that do not fit; it names them.
    """
    _check_heads(Path(folder), qformer)
    stored = {_modern(name): tensor for name, tensor in open_tensors(folder).items()}
    targets = dict(qformer.named_parameters())
    table = _table(qformer)
    report = LoadReport(Path(folder))
    values: dict[str, np.ndarray] = {}
    for source, names in table.items():
        if source not in stored:
            if not source.startswith("cls."):
                raise UserError(f"{folder} lacks {source}: it is no BERT of {len(qformer.layers)} layers")
            report.missing.update(dict.fromkeys(names, "the file has no language-model head; it stays random"))
            continue
        array = stored[source].read()
        for name in names:
            values[name] = _fitted(array, targets[name], source, name, folder)
    for name in stored.keys() - table.keys():
        reason = next((why for start, why in _DROPPED.items() if name.startswith(start)), None)
        if reason is None:
            raise UserError(f"{folder} has {name}, which the Q-Former has no place for: its depth is {len(qformer.layers)}")
        report.dropped[name] = reason
    for name, value in values.items():
        targets[name].set_value(value)
        report.loaded.append(name)
    report.missing.update(dict.fromkeys(sorted(targets.keys() - values.keys() - report.missing.keys()), "not in BERT; new"))
    return report


def _table(qformer: QFormer) -> dict[str, list[str]]:
    table = {
        _WORDS: ["text.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": ["text.position_embeddings.weight"],
        _HEAD_BIAS: ["text.head_bias"],
    }
    for kind in ("weight", "bias"):
        table |= {f"{source}.{kind}": [f"{name}.{kind}"] for source, name in _OUTSIDE.items()}
        for index in range(len(qformer.layers)):
            for source, names in _IN_LAYER.items():
                table[f"encoder.layer.{index}.{source}.{kind}"] = [f"layers.{index}.{name}.{kind}" for name in names]
    return table


def _check_heads(folder: Path, qformer: QFormer) -> None:
    """The one number that shapes cannot tell; a folder without a configuration is trusted."""
    config, ours = folder / "config.json", qformer.layers[0].attention.num_heads
    if config.is_file() and (theirs := read_json(config).get("num_attention_heads", ours)) != ours:
        raise UserError(f"{config}: num_attention_heads is {theirs!r}, but the configured Q-Former has {ours}")


def _modern(name: str) -> str:
    """Files of 2018 call a norm's weight and bias gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _fitted(array: np.ndarray, parameter: Tensor, source: str, name: str, folder: str | Path) -> np.ndarray:
    wanted = list(parameter.shape)
    if array.ndim == 2 and "embeddings" not in source:
        array = np.ascontiguousarray(array.T)  # Paddle's Linear is [in, out]
    if source in (_WORDS, _HEAD_BIAS) and len(array) < wanted[0] and list(array.shape[1:]) == wanted[1:]:
        array = np.concatenate([array, parameter.numpy()[len(array) :]])
    if list(array.shape) != wanted:
        raise UserError(f"{folder}: {source} makes {list(array.shape)}, but the Q-Former's {name} is {wanted}")
    return array
