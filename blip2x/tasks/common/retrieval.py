"""What stage 1 is worth on held-out images: retrieval by contrast, matching, and captions of the Q-Former alone.

B rows, N images, M texts, L text tokens, Q queries, E width of the shared space, P patches, D width of the image encoder,
K pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.config.task import PretrainStage1Config, RetrievalConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.tokenize import TextTokenizer, clean_caption
from blip2x.engine.amp import full_precision
from blip2x.engine.batches import to_tensors
from blip2x.engine.run import Run
from blip2x.metrics.caption import score_names
from blip2x.metrics.retrieval import Hits, hardest_pairs, hits_of_rows, require_finite
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.qformer.qformer import rows_of
from blip2x.parallel.context import Context
from blip2x.tasks.common.captioning import (
    VALIDATION_METRICS,
    captions_behind,
    first,
    validation_scores,
    validation_settings,
)
from blip2x.tasks.common.loading import Share
from blip2x.tasks.common.merge import gather_array, gather_rows
from blip2x.tasks.common.results import metric_key

_PRODUCTS = 1 << 23  # of queries and texts in memory, 32 MB
RECALLS = tuple(f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))

Row = Callable[[int], np.ndarray]  # place of an image or a text -> the scores of all texts or images


@dataclass(frozen=True)
class Texts:
    """All texts of images, one image after the other, as tokens."""

    texts: list[str]
    owner_M: np.ndarray  # the place of each text's image
    ids_ML: np.ndarray
    mask_ML: np.ndarray

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], tokenizer: TextTokenizer, max_length: int) -> Texts:
        """Of each image's captions; at least one in all."""
        texts = [text for own in captions for text in own]
        owner_M = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
        return cls(texts, owner_M, *tokenizer.encode(texts, max_length=max_length))

    def tensors(self, places: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Token numbers and mask [B, L] of the texts at `places`, as long as the longest of them."""
        mask_BL = self.mask_ML[places]
        length = int(mask_BL.sum(axis=1).max())
        return paddle.to_tensor(self.ids_ML[places][:, :length]), paddle.to_tensor(mask_BL[:, :length])


def searched_texts(task: PretrainStage1Config, samples: Sequence[CaptionSample]) -> list[list[str]]:
    """Each image's captions as they are searched: those of retrieval cleaned, where its config says so."""
    prepare = clean_caption if isinstance(task, RetrievalConfig) and task.clean_texts else str
    return [[prepare(text) for text in sample.captions] for sample in samples]


def text_features(context: Context, model: Stage1Model, texts: Texts, batch_size: int) -> np.ndarray:
    """Unit vectors [M, E] in float32, each text encoded by one rank. All ranks must call it."""
    own, blocks = range(context.data_rank, len(texts.texts), context.data_size), []
    for start in range(0, len(own), batch_size):
        text_BE = model.text_features(*texts.tensors(own[start : start + batch_size]))
        blocks.append(text_BE.astype("float32").numpy())
    return gather_array(context, own, blocks, np.arange(len(texts.texts)))


def similarities(image_NQE: np.ndarray, text_ME: np.ndarray) -> np.ndarray:
    """Scores [N, M] of all pairs, each by its best query, in float32; there is little in memory beside them."""
    (images, queries, _), texts = image_NQE.shape, len(text_ME)
    found_NM, text = np.empty((images, texts), dtype=np.float32), paddle.to_tensor(text_ME)
    at_once = max(1, _PRODUCTS // (queries * texts))
    with full_precision():
        for start in range(0, images, at_once):
            image_BQE = paddle.to_tensor(image_NQE[start : start + at_once])
            found_NM[start : start + at_once] = paddle.matmul(image_BQE, text, transpose_y=True).max(axis=1).numpy()
    return found_NM


def hits(text_scores: Row, image_scores: Row, samples: Sequence[CaptionSample], owner_M: np.ndarray) -> dict[str, Hits]:
    """Which queries find what is right: of all ("") and, where there are several, per group of images.

    A group's images and texts are each other's only candidates, so that it has its own chance; they are in the order that they
    have among all.
    """
    groups = sorted({sample.group for sample in samples} - {""})
    results = {}
    for group in ("", *(groups if len(groups) > 1 else ())):
        rows = np.array([row for row, sample in enumerate(samples) if group in ("", sample.group)])
        columns = np.flatnonzero(np.isin(owner_M, rows))
        i2t = hits_of_rows("i2t", (text_scores(row)[columns] for row in rows), rows, owner_M[columns])
        t2i = hits_of_rows("t2i", (image_scores(column)[rows] for column in columns), owner_M[columns], rows)
        results[group] = Hits(i2t, t2i, rows, owner_M[columns])
    return results


def recalls(found: Mapping[str, Hits]) -> dict[str, float]:
    """Recalls and what chance gets, of what `hits` gives, as "group/name"."""
    results = {}
    for group, own in found.items():
        results |= {metric_key(name, scope=group): value for name, value in own.recalls().items()}
        results[metric_key("chance", scope=group)] = own.chance()
    return results


@dataclass
class _Images:
    """What one pass over the images leaves on this rank."""

    places: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)  # [rows, Q, E] per batch
    patches: dict[int, Tensor] = field(default_factory=dict)  # place -> [P, D], of the first images only
    captions: list[tuple[int, str]] = field(default_factory=list)  # (place, text), of the first images only


class Stage1Validation:
    """Recall both ways, matching's accuracy on hard pairs, temperature, and scores of captions; nothing is drawn by lot.

    Each image goes through the image encoder and its queries once for all of it. Of every image the queries' unit vectors are
    kept (32 KB at full size). Matching looks at the patches again, together with a text that is known only when all images have
    been compared: the patches of the first ``validation.max_images`` images stay on the device until then (1,000 of ViT-g: 1.5
    GB in float32, divided among the ranks), and the rank that has an image judges the pairs that it is in. Captions are written
    batch by batch, from the queries' keys and values, which are not kept.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: in evaluation mode when this is called.
        tokenizer: the Q-Former's.
        samples: one per image.
    """

    def __init__(
        self, cfg: RunConfig, run: Run, model: Stage1Model, tokenizer: TextTokenizer, samples: Sequence[CaptionSample]
    ):
        self._cfg, self._run, self._model, self._tokenizer, self._samples = cfg, run, model, tokenizer, samples
        self._task: PretrainStage1Config = cfg.task
        self._settings = validation_settings(cfg.task.validation) if cfg.task.lm_weight else None

    @classmethod
    def names(cls, task: PretrainStage1Config) -> set[str]:
        """What it gives of all images together; there are no values of losses that are not trained."""
        matching = {"eval_itm_accuracy", "majority_eval_itm_accuracy"} if task.itm_weight else set()
        scores = score_names(VALIDATION_METRICS) if task.validation.captions and task.lm_weight else set()
        return {*RECALLS, "chance", "eval_temperature", *matching, *scores}

    @paddle.no_grad()
    def __call__(self) -> dict[str, float]:
        """The values by name; recalls also per group of images, as "group/name". All ranks must call it."""
        context, limit = self._run.context, self._task.validation.max_images
        share = Share.of_images(self._cfg, self._run, self._samples, "validate", self._model)
        images = self._look(share)
        image_NQE = gather_array(context, images.places, images.features, share.found)
        samples = [self._samples[place] for place in share.found]
        captions = searched_texts(self._task, samples)
        texts = Texts.of(captions, self._tokenizer, self._task.max_txt_len)
        text_ME = text_features(context, self._model, texts, self._task.eval_batch_size)
        captioned = share.found if limit is None else share.found[share.found < limit]

        def compare() -> tuple[dict[str, float], np.ndarray]:
            similarity_NM = similarities(image_NQE, text_ME)
            require_finite(similarity_NM)
            pairs_K3 = hardest_pairs(similarity_NM[: len(captioned)], captions[: len(captioned)])
            found = hits(similarity_NM.__getitem__, similarity_NM.T.__getitem__, samples, texts.owner_M)
            return recalls(found), pairs_K3

        # once, and the same everywhere: ranks that chose pairs by themselves could choose differently where scores are close
        metrics, pairs_K3 = context.on_main(compare)
        metrics["eval_temperature"] = float(self._model.temp)
        if self._task.itm_weight and len(pairs_K3):
            patches = {row: images.patches[place] for row, place in enumerate(captioned.tolist()) if place in images.patches}
            metrics["eval_itm_accuracy"] = self._match(patches, texts, pairs_K3)
            matching = pairs_K3[:, 2].mean()  # a third, and guessing "no" each time is right for the rest
            metrics["majority_eval_itm_accuracy"] = float(max(matching, 1 - matching))
        if self._settings and len(captioned):
            captions = gather_rows(context, images.captions, captioned)
            metrics |= validation_scores(self._run, samples[: len(captioned)], captions, VALIDATION_METRICS)
        return metrics

    def _look(self, share: Share) -> _Images:
        found = _Images()
        for places, batch in share:
            patch_BPD = self._model.ln_vision(self._model.encoded(to_tensors(batch)))
            _, image_BQE, cache = self._model.query_features(patch_BPD)
            found.places += places
            found.features.append(image_BQE.astype("float32").numpy())
            chosen = first(self._task.validation.max_images, places)
            if self._task.itm_weight:
                found.patches |= {places[row]: patch_BPD[row] for row in chosen}
            if self._settings and chosen:
                behind = rows_of(cache, paddle.to_tensor(chosen))
                written = captions_behind(self._model, self._tokenizer, behind, self._settings)
                found.captions += [(places[row], texts[0].text) for row, texts in zip(chosen, written, strict=True)]
        return found

    def _match(self, patches: dict[int, Tensor], texts: Texts, pairs_K3: np.ndarray) -> float:
        """Share of right decisions about the pairs (image, text, whether they match); `patches` are of this rank's images."""
        own, size = pairs_K3[np.isin(pairs_K3[:, 0], list(patches))], self._task.eval_batch_size
        right = 0
        for start in range(0, len(own), size):
            image_B, text_B, label_B = own[start : start + size].T
            patch_BPD = paddle.stack([patches[row] for row in image_B])
            logits_B2 = self._model.itm_logits(patch_BPD, *texts.tensors(text_B))
            right += int((logits_B2.argmax(axis=1).numpy() == label_B).sum())
        rights, counts = zip(*self._run.context.gather_objects((right, len(own))), strict=True)
        if sum(counts) != len(pairs_K3):
            raise RuntimeError(f"{sum(counts)} pairs were judged by all ranks together, not {len(pairs_K3)}")
        return sum(rights) / len(pairs_K3)
