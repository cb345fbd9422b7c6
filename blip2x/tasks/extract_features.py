"""Write what a stage-1 model makes of images, of texts, or of both together, to files.

B rows, Q queries, D width of the Q-Former, E width of the shared space, L text tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.run import RunConfig
from blip2x.config.tools import ExtractFeaturesConfig, FeatureMode
from blip2x.data.collate import ImageCollate
from blip2x.data.download import WebImage, is_web_address
from blip2x.data.loader import Loader, build_loader
from blip2x.data.picture_inputs import list_pictures
from blip2x.data.pictures import PathImage
from blip2x.data.samples import CaptionSample, PictureSample
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer, clean_caption
from blip2x.engine.batches import to_tensors
from blip2x.engine.progress import ProgressBar
from blip2x.engine.result import TaskResult
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.qformer.qformer import rows_of
from blip2x.registry import TASKS
from blip2x.tasks.common.feature_files import FeatureFiles
from blip2x.tasks.common.inputs import require_captions
from blip2x.tasks.common.loading import eval_transform, report_skipped
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import Start

Item = dict[str, Any]  # what the index says of a row: image_id, name; text where there is one
Sample = CaptionSample | PictureSample


@TASKS.register("extract_features")
class ExtractFeatures(Task):
    """Shards of features, shared between ranks; a run that is gone on with leaves whole ones as they are."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions, with their images; none where other pictures are given."""
        return [] if cfg.task.inputs else [("captions", cfg.task.split.value)]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through stage 1."""
        return Start("qformer.text.", ("pretrain_stage1", "retrieval"))

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """The image encoder, where the whole model's weights do not bring it."""
        return ["model.vision.weights", "model.weights"]

    @classmethod
    def check(cls, cfg: RunConfig, promised: frozenset[str] = frozenset()) -> None:
        """As for all tasks, and the pictures that are given; addresses are not tried."""
        if cfg.task.inputs:
            list_pictures(cfg.task.inputs)
        super().check(cfg, promised)

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample]) -> None:
        """There are texts where features of texts are asked for."""
        if cfg.task.mode is not FeatureMode.image:
            require_captions(cfg, split, samples, f"task.mode={cfg.task.mode.value}")

    @paddle.no_grad()
    def run(self) -> TaskResult:
        """Write what is not there yet; how many rows there are, and how many were left out."""
        model, tokenizer = ModelLoader.of_run(self.cfg, self.run_folder).stage1()
        extractor = Extractor(self.cfg, model, tokenizer)
        samples, size = self._samples(), self.task.shard_size
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        files = FeatureFiles(
            self.run_folder.path("features"),
            self.task.format,
            extractor.arrays,
            self.task.dtype.value,
            texts=self.task.mode is not FeatureMode.image,
        )
        description = self.context.on_main(lambda: self._description(model, extractor, samples, len(parts)))
        self.context.on_main(lambda: files.begin(description))
        own = range(self.context.data_rank, len(parts), self.context.data_size)
        rows = {shard: files.rows(shard) for shard in own}
        self.context.barrier()  # ranks that share a matrix have looked before one of them writes
        missing = [shard for shard in own if rows[shard] is None]
        if len(missing) < len(own):
            self.console.print(f"{len(own) - len(missing)} of {len(own)} shards are there already", highlight=False)
        batches = sum(-(-len(parts[shard]) // self.task.eval_batch_size) for shard in missing)
        with ProgressBar(self.console, "extract", batches) as bar:
            for shard in missing:
                items, arrays = [], []
                for found, features, seen in extractor.batches(parts[shard]):
                    items += found
                    arrays.append(features)
                    bar.advance(seen)
                if self.context.tensor.rank == 0:
                    files.write(shard, items, arrays)
                rows[shard] = len(items)
        report_skipped(self.run_folder, extractor.skipped)
        total = sum(self.context.gather_objects(sum(rows.values())))
        self.context.on_main(lambda: files.finish(description, total))
        return TaskResult({"rows": total, "skipped": sum(map(extractor.rows_of, samples)) - total, "shards": len(parts)})

    def _samples(self) -> list[Any]:
        """What is divided into shards: pictures, images with their captions, or (image's sample, text)."""
        if self.task.inputs:
            names = self.context.on_main(lambda: list_pictures(self.task.inputs))
            limit = self.cfg.dataset.max_pixels
            opened = (WebImage(name, limit) if is_web_address(name) else PathImage(Path(name), limit) for name in names)
            return [PictureSample(picture, number) for number, picture in enumerate(opened)]
        samples = self.read(self.source.captions, self.task.split.value)
        if self.task.mode is not FeatureMode.text:
            return samples
        return [(sample, text) for sample in samples for text in sample.captions]

    def _description(self, model: Stage1Model, extractor: Extractor, samples: Sequence[Any], shards: int) -> dict[str, Any]:
        """What the manifest says; a run whose own differs does not go on with the files."""
        task, transform = self.task, self.cfg.dataset.transform
        return {
            "mode": task.mode.value,
            "of": task.inputs or f"{self.cfg.dataset.name}, {task.split.value}",
            "samples": len(samples),
            "samples_sha256": _digest(samples),
            "shards": shards,
            "shard_size": task.shard_size,
            "format": task.format.value,
            "dtype": task.dtype.value,
            "arrays": {name: list(shape) for name, shape in extractor.arrays.items()},
            "model": {"name": self.cfg.model.name, "sha256": _fingerprint(model)},
            "precision": self.cfg.precision.name.value,
            "transform": {
                "image_size": self.cfg.model.vision.image_size, "mean": list(transform.mean), "std": list(transform.std)
            },
            "max_txt_len": task.max_txt_len,
            "clean_texts": task.clean_texts,
        }  # fmt: skip


class Extractor:
    """From samples to rows of features.

    Attributes:
        arrays: name -> shape of a row. image_embeds [Q, D] is the queries' output and image_embeds_proj [Q, E] their unit
            vectors; text_embeds [D] is the output at [CLS] and text_embeds_proj [E] its unit vector; multimodal_embeds [Q, D]
            is the queries' output when they have seen image and text.
        skipped: a sentence per image that could not be read.

    Args:
        cfg: the whole config.
        model: in evaluation mode.
        tokenizer: the Q-Former's.
    """

    def __init__(self, cfg: RunConfig, model: Stage1Model, tokenizer: TextTokenizer):
        self._cfg, self._model, self._tokenizer = cfg, model, tokenizer
        self._task: ExtractFeaturesConfig = cfg.task
        qformer = cfg.model.qformer
        queries, width, shared = qformer.num_queries, qformer.width, qformer.embed_dim
        self.arrays: dict[str, tuple[int, ...]] = {
            FeatureMode.image: {"image_embeds": (queries, width), "image_embeds_proj": (queries, shared)},
            FeatureMode.text: {"text_embeds": (width,), "text_embeds_proj": (shared,)},
            FeatureMode.multimodal: {"multimodal_embeds": (queries, width)},
        }[self._task.mode]
        self.skipped: list[str] = []

    def rows_of(self, sample: Any) -> int:
        """How many rows a sample makes."""
        return len(sample.captions) if self._task.mode is FeatureMode.multimodal else 1

    def batches(self, part: Sequence[Any]) -> Iterator[tuple[list[Item], dict[str, np.ndarray], int]]:
        """What rows are of, their features, and the number of samples, batch after batch of one shard's samples."""
        if self._task.mode is FeatureMode.text:
            for start in range(0, len(part), self._task.eval_batch_size):
                chosen = part[start : start + self._task.eval_batch_size]
                yield [item(*each) for each in chosen], self._texts([text for _, text in chosen]), len(chosen)
            return
        loader = self._loader(part)
        for batch in loader:
            samples = [part[place] for place in loader.samples]
            image_BCHW = to_tensors(batch)["image_BCHW"]
            if self._task.mode is FeatureMode.image:
                _, query_BQD, image_BQE, _ = self._model.image_features(image_BCHW)
                features = _arrays({"image_embeds": query_BQD, "image_embeds_proj": image_BQE})
                yield [item(sample) for sample in samples], features, len(samples)
            else:
                items = [item(sample, text) for sample in samples for text in sample.captions]
                yield items, self._pairs(image_BCHW, samples), len(samples)
        self.skipped += loader.skipped

    def _loader(self, part: Sequence[Sample]) -> Loader:
        """Of one shard: its batches, and with them the last bits of its features, do not depend on the number of ranks."""
        return build_loader(
            part,
            ImageCollate(eval_transform(self._cfg)),
            batch_size=self._task.eval_batch_size,
            shuffle=False,
            seed=self._cfg.seed,
            num_workers=self._cfg.dataset.num_workers,
            on_bad_image=self._cfg.dataset.on_bad_image,
        )

    def _texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        text_BD = self._model.qformer.encode_text(*self._tokens(texts))
        return _arrays({"text_embeds": text_BD, "text_embeds_proj": F.normalize(self._model.text_proj(text_BD), axis=-1)})

    def _pairs(self, image_BCHW: Tensor, samples: Sequence[CaptionSample]) -> dict[str, np.ndarray]:
        """Of each image with each of its texts; each image is encoded, and its patches made keys and values, once."""
        image = self._model.qformer.look(self._model.ln_vision(self._model.vision(image_BCHW)))
        pairs = [(row, text) for row, sample in enumerate(samples) for text in sample.captions]
        found = []
        for start in range(0, len(pairs), self._task.eval_batch_size):
            rows, texts = zip(*pairs[start : start + self._task.eval_batch_size], strict=True)
            found.append(self._model.qformer.encode_pair(rows_of(image, paddle.to_tensor(rows)), *self._tokens(texts)))
        return _arrays({"multimodal_embeds": paddle.concat(found)})

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        prepared = [clean_caption(text) for text in texts] if self._task.clean_texts else texts
        ids_BL, mask_BL = self._tokenizer.encode(prepared, max_length=self._task.max_txt_len)
        return paddle.to_tensor(ids_BL), paddle.to_tensor(mask_BL)


def item(sample: Sample, text: str | None = None) -> Item:
    """What the index says of a row."""
    found = {"image_id": sample.image_id, "name": sample.image.name}
    return found if text is None else {**found, "text": text}


def _arrays(features: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.astype("float32").numpy() for name, tensor in features.items()}


def _digest(samples: Sequence[Any]) -> str:
    """Of all samples' numbers, file names and texts, in order; a folder that was moved keeps its own."""
    digest = hashlib.sha256()
    for sample in samples:
        image, *texts = sample if isinstance(sample, tuple) else (sample, *getattr(sample, "captions", ()))
        digest.update(json.dumps([image.image_id, Path(image.image.name).name, texts]).encode())
    return digest.hexdigest()


def _fingerprint(model: nn.Layer) -> str:
    """Of all weights, whatever files they came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + np.ascontiguousarray(parameter.numpy()).tobytes())
    return digest.hexdigest()
