"""Write a model's weights as a Hugging Face folder or as a blip2x checkpoint, tensor by tensor; no model is built."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from blip2x.config.auto import PARTS
from blip2x.config.run import RunConfig
from blip2x.config.tools import Format
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.checkpoint import whole_folder, write_checkpoint
from blip2x.engine.folders import require_space
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.models.weights.describe import settings_of
from blip2x.models.weights.export import huggingface_config, to_huggingface, usual_ends, write_json, write_shards
from blip2x.models.weights.names.language import OPT_WORDS
from blip2x.models.weights.source import Source, Used
from blip2x.models.weights.stored import BFLOAT16, StoredTensor, is_real, size_of
from blip2x.registry import TASKS
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import CLIP_NORMALISATION, Start, Weights, source_normalisation

Tensors = dict[str, StoredTensor]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES += ("vocab.json", "merges.txt", "vocab.txt", "spiece.model")
# As of the published models. Hugging Face's classes add tokens of their own where none are named, in the image token's place
_TOKENIZER = {
    "bert": {"tokenizer_class": "BertTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "opt": {"tokenizer_class": "GPT2TokenizerFast", "bos_token": "</s>", "eos_token": "</s>"},
    "t5": {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "extra_ids": 0},
}
_TOKENIZER["bert"] |= {"unk_token": "[UNK]", "pad_token": "[PAD]"}
_TOKENIZER["opt"] |= {"unk_token": "</s>", "pad_token": "<pad>"}
_TOKENIZER["t5"] |= {"unk_token": "<unk>", "pad_token": "<pad>"}
_AROUND = {"bert": "[CLS] $A [SEP]", "opt": "</s> $A", "t5": "$A </s>"}  # a text


@TASKS.register("convert")
class Convert(Task):
    """What became of every name stands in coverage.csv; the weights are in ``converted`` of the run's folder."""

    shows_pictures: ClassVar[bool] = False

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """The whole model's, and those of its parts where that does not hold them."""
        whole = Weights(cfg.model, cfg.paths, cfg.model.weights)
        return ["model.weights", *(f"model.{part}.weights" for part in _parts(whole.source))]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """Either stage's model."""
        tasks = ("pretrain_stage1", "pretrain_stage2", "caption", "retrieval", "vqa_finetune")
        return Start("qformer.", tasks, ", or published weights of BLIP-2", takes_questions=True)

    def run(self) -> TaskResult:
        """Write; how many tensors and bytes there are, and how many names were left out."""
        return self.context.on_main(self._convert)

    def _convert(self) -> TaskResult:
        weights = Weights(self.cfg.model, self.cfg.paths, self.cfg.model.weights)
        source = weights.source
        parts = _parts(source)
        tensors: Tensors = {}
        rows: list[dict[str, Any]] = []
        for found, its in weights.sources(parts):
            tensors |= its
            rows += [_coverage(found, row, its) for row in found.coverage]
            self._say(found.summary())
        for part in parts:
            if not any(name.startswith(f"{part}.") for name in tensors):
                raise UserError(f"{weights.whole} does not hold the {part} part; say where it is with model.{part}.weights")
        if self.task.dtype is not None:
            tensors = {name: _cast(tensor, self.task.dtype.value) for name, tensor in tensors.items()}
        size = sum(size_of(tensor) for tensor in tensors.values())
        folder = self.run_folder.path("converted")
        require_space(folder.parent, size)
        tokenizers = self._tokenizers(weights, source)
        if self.task.to is Format.blip2x:
            self._write_checkpoint(folder, weights, tensors, tokenizers)
        else:
            left = self._write_huggingface(folder, source, tensors, tokenizers)
            rows += [{"file": "", "theirs": "", "ours": name, "reason": f"not written: {why}"} for name, why in left.items()]
        self._write_coverage(rows)
        self._say(f"written to {folder}: {len(tensors)} tensors, {size / 1e9:.2f} GB")
        left_out = sum(1 for row in rows if not row["theirs"] or not row["ours"])
        return TaskResult({"tensors": len(tensors), "gigabytes": size / 1e9, "left_out": left_out}, {"model.weights": folder})

    def _tokenizers(self, weights: Weights, source: Source) -> dict[str, TextTokenizer]:
        loader = ModelLoader(weights, texts=list, say=self._say)
        parts = ["language"] if source.has("language_proj.") else ["qformer"]
        if weights.reads_questions:
            parts.append("qformer")
        found = {part: loader.own_tokenizer(part, fetch=False) for part in parts}
        return {part: tokenizer for part, tokenizer in found.items() if tokenizer}

    def _write_checkpoint(self, folder: Path, weights: Weights, tensors: Tensors, tokenizers: dict[str, TextTokenizer]) -> None:
        source = weights.source
        parts = [part for part in PARTS if any(name.startswith(f"{part}.") for name in tensors)]
        extra = {
            "model": self.cfg.model.name,
            "settings": settings_of(self.cfg.model, parts),
            "normalisation": source_normalisation(source),
            "converted_from": f"{source.family}: {source.path}",
            "huggingface": source.settings,
        }
        frozen = {"names": [], "origin": {}}
        write_checkpoint(folder, tensors, kind="convert", step=0, extra=extra, tokenizers=tokenizers, frozen=frozen)

    def _write_huggingface(
        self, folder: Path, source: Source, tensors: Tensors, tokenizers: dict[str, TextTokenizer]
    ) -> dict[str, str]:
        theirs, left = to_huggingface(tensors)
        tokenizer = next(iter(tokenizers.values()), None)
        written = dict(source.settings)
        if not source.config:
            written |= self._new_settings(tensors, tokenizer)
        elif self.task.dtype is not None:
            written["config.json"] = _with_dtype(source.config, self.task.dtype.value)
        config = written["config.json"]
        size = config["vision_config"].get("image_size", 224)
        written.setdefault("preprocessor_config.json", _preprocessor(size, source_normalisation(source)))
        if not source.config and self.cfg.model.ln_vision_eps != config["vision_config"]["layer_norm_eps"]:
            self._say(
                f"note: ln_vision has eps {self.cfg.model.ln_vision_eps:g} here, and 1e-06 in Hugging Face's models, "
                "which share one value between all norms of the image encoder"
            )
        with whole_folder(folder) as partial:
            write_shards(partial, theirs, self.task.max_shard_gb)
            for name, content in written.items():
                write_json(partial / name, content)
            if tokenizer:
                _write_tokenizer(partial, tokenizer)
            for name in _TOKENIZER_FILES:  # of a Hugging Face folder, as they are
                if source.path.is_dir() and (source.path / name).is_file():
                    shutil.copyfile(source.path / name, partial / name)
        return left

    def _new_settings(self, tensors: Tensors, tokenizer: TextTokenizer | None) -> dict[str, dict[str, Any]]:
        """What stands beside the weights of a model that is not Hugging Face's."""
        if not any(name.startswith("language.") for name in tensors):
            return {"config.json": huggingface_config(self.cfg.model, tensors, end=0, pad=0)}  # there is no language model
        words = next(tensors[name].shape[0] for name in (OPT_WORDS, "language.shared.weight") if name in tensors)
        end, pad = usual_ends(self.cfg.model.language.kind, words)
        image = None
        if tokenizer:
            end, pad, image = tokenizer.end_id, tokenizer.pad_id, tokenizer.tokenizer.token_to_id("<image>")
            image = tokenizer.vocab_size if image is None else image
            if image >= words:
                self._say(
                    f"note: the model's {words} words have no place for the <image> that Hugging Face's processor will add; "
                    "give the model ids, with config.json's image_token_index where the image goes"
                )
        return {
            "config.json": huggingface_config(self.cfg.model, tensors, end=end, pad=pad, image=image),
            "generation_config.json": {"eos_token_id": end, "pad_token_id": pad},
            # without the number, the processor gives images no place in a prompt, and the model sees none
            "processor_config.json": {
                "processor_class": "Blip2Processor",
                "num_query_tokens": self.cfg.model.qformer.num_queries,
            },
        }

    def _write_coverage(self, rows: list[dict[str, Any]]) -> None:
        path = self.run_folder.path("coverage.csv")
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file", "theirs", "ours", "reason", "shape", "dtype"])
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _parts(source: Source | None) -> list[str]:
    """The parts that a model has besides the Q-Former."""
    return ["vision", *(["language"] if source and source.has("language_proj.") else [])]


def _cast(tensor: StoredTensor, dtype: str) -> StoredTensor:
    if not is_real(tensor.dtype):
        return tensor
    wanted = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):
            array = tensor.open().astype(wanted)
        if not np.isfinite(array).all():
            raise UserError(f"{tensor.where} holds numbers that {dtype} does not; choose another task.dtype")
        return array

    return StoredTensor(tensor.where, tensor.shape, wanted, read)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json whose parts may name their types, too; transformers called it torch_dtype before 4.56."""
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in config.items()}
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return changed | dict.fromkeys(named or (["dtype"] if "vision_config" in config else []), dtype)


def _coverage(source: Source, used: Used, tensors: Tensors) -> dict[str, Any]:
    """A row of coverage.csv; `tensors` are those that were taken from the source."""
    if used.ours and used.ours not in tensors:
        used = used._replace(ours=None, reason="not of this part of the model")
    return {"file": str(source.path), **used._asdict(), "shape": list(used.shape)}


def _preprocessor(size: int, normalisation: dict[str, list[float]] | None) -> dict[str, Any]:
    numbers = normalisation or CLIP_NORMALISATION
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": numbers["mean"],
        "image_std": numbers["std"],
    }


def _write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    ours = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    place = ours.token_to_id
    config = _TOKENIZER[tokenizer.family] | {"processor_class": "Blip2Processor"}
    if place("[MASK]") is None:  # in a tokenizer that was trained here
        config.pop("mask_token", None)
    if ours.post_processor is None:  # ours puts the ends there itself
        around = _AROUND[tokenizer.family]
        ends = [(token, place(token)) for token in dict.fromkeys(around.split()) if token != "$A"]
        ours.post_processor = TemplateProcessing(single=around, special_tokens=ends)
    ours.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
