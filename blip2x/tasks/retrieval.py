"""Image-text retrieval: the best candidates by contrast are ranked anew by matching.

Where ``task.train`` is true the model is fine-tuned first.

B rows, N images, M texts, Q queries, E width of the shared space, S candidates on a shortlist, K pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from blip2x.config.run import RunConfig
from blip2x.config.task import RetrievalConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.evaluate import track
from blip2x.engine.report import FOUND, shown_searches
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.metrics.retrieval import Hits, Reranked, Shortlists, largest, right_candidates
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.registry import TASKS
from blip2x.tasks.common.inputs import require_captions
from blip2x.tasks.common.loading import Share
from blip2x.tasks.common.merge import gather_array
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pair_batches import pair_batches
from blip2x.tasks.common.patch_store import PatchStore
from blip2x.tasks.common.pictures import save_pictures
from blip2x.tasks.common.results import interval_metrics, metric_key
from blip2x.tasks.common.retrieval import Stage1Validation, Texts, hits, searched_texts, similarities, text_features
from blip2x.tasks.common.stage1_training import train_stage1
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import Start

_SHOWN = 10  # candidates of each image and text in predictions.jsonl


@TASKS.register("retrieval")
class Retrieval(Task):
    """Recall in both directions, by contrast alone (itc_) and re-ranked; each pair of an image and a text is matched once."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions to search, and to train on and choose by."""
        return [("captions", split) for split in (("eval", "train", "val") if cfg.task.train else ("eval",))]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through stage 1."""
        return Start("itm_head.", ("pretrain_stage1", "retrieval"))

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """The image encoder, where the whole model's weights do not bring it."""
        return ["model.vision.weights", "model.weights"]

    @classmethod
    def promises(cls, cfg: RunConfig) -> set[str]:
        """After a training as stage 1: also what reads texts in the Q-Former."""
        return {*super().promises(cfg), *(["model.qformer.weights"] if cfg.task.train else [])}

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample]) -> None:
        """There is something to find."""
        if split != "train":
            require_captions(cfg, split, samples, "a search" if split == "eval" else "a validation of task.train=true")

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """As stage 1's: contrast is what a validation ranks by."""
        return Stage1Validation.names(cfg.task)

    def run(self) -> TaskResult:
        """Train where asked for, then search."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage1()
        samples = self.read(self.source.captions, "eval")
        weights = {}
        if self.task.train:
            train_stage1(self, loader, model, tokenizer)
            weights = dict.fromkeys(("model.weights", "model.qformer.weights"), self.checkpoint_folder())
        search = Search(self.cfg, self.run_folder, model, tokenizer, samples)
        metrics = search()
        self.run_folder.write_predictions(search.rows)
        return TaskResult(metrics, weights)


class Search:
    """Ranks all texts for each image and all images for each text, as LAVIS's compute_sim_matrix.

    Each image is encoded once: its queries' unit vectors are gathered from all ranks, its patches stay with the rank that
    encoded it, which matches it with all the texts that it shares a shortlist with. A pair scores its logit of "matches" plus
    its similarity. What is on no shortlist comes behind, by similarity.

    Attributes:
        rows: of predictions.jsonl, on the main rank, after the call.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: in evaluation mode.
        tokenizer: the Q-Former's.
        samples: one per image.
    """

    def __init__(
        self, cfg: RunConfig, run: Run, model: Stage1Model, tokenizer: TextTokenizer, samples: Sequence[CaptionSample]
    ):
        self._cfg, self._run, self._model, self._tokenizer, self._samples = cfg, run, model, tokenizer, samples
        self._task: RetrievalConfig = cfg.task
        self.rows: list[dict[str, Any]] = []

    @paddle.no_grad()
    def __call__(self) -> dict[str, float]:
        """Recalls and their intervals by name, also per group of images, as "group/name"; counts. All ranks must call it."""
        context, size = self._run.context, self._task.eval_batch_size
        share = Share.of_images(self._cfg, self._run, self._samples, "encode", self._model)
        store, image_NQE = self._encode(share)
        samples = [self._samples[place] for place in share.found]
        texts = Texts.of(searched_texts(self._task, samples), self._tokenizer, self._task.eval_max_txt_len)
        text_ME = text_features(context, self._model, texts, size)
        chosen: list[Shortlists] = []

        def choose() -> np.ndarray:
            chosen.append(Shortlists.of(similarities(image_NQE, text_ME), self._task.k_test))
            return chosen[0].pairs()

        pair_K = context.on_main(choose)  # once: ranks could choose differently where similarities are close
        score_K = self._match(store, share.found, texts, pair_K)
        self._run.console.print(f"{len(pair_K):,} pairs matched; ranking", highlight=False)

        def rank() -> dict[str, float]:
            found, similarity_NM = chosen[0].rerank(pair_K, score_K), chosen[0].similarity_NM
            by_contrast = hits(similarity_NM.__getitem__, similarity_NM.T.__getitem__, samples, texts.owner_M)
            self.rows = self._predictions(samples, texts, *found)
            metrics = _together(hits(found[0].row, found[1].row, samples, texts.owner_M), by_contrast)
            return {**metrics, "images": len(samples), "texts": len(texts.texts)}

        return context.on_main(rank)

    def _encode(self, share: Share) -> tuple[PatchStore, np.ndarray]:
        context, task = self._run.context, self._task
        own = len(range(context.data_rank, len(self._samples), context.data_size))
        memory, dtype = 1e9 * task.patch_memory_gb, task.patch_dtype.value
        store = PatchStore(self._run.folder, own, memory_bytes=memory, dtype=dtype)
        features = []
        for places, batch in share:
            patch_BPD = self._model.ln_vision(self._model.encoded(to_tensors(batch)))
            _, image_BQE, _ = self._model.query_features(patch_BPD)
            store.add(places, patch_BPD)
            features.append(image_BQE.astype("float32").numpy())
        return store, gather_array(context, store.places, features, share.found)

    def _match(self, store: PatchStore, found: np.ndarray, texts: Texts, pair_K: np.ndarray) -> np.ndarray:
        """The logits [K] of "matches", of all ranks' images."""
        image_K, text_K = np.divmod(pair_K, len(texts.texts))
        own = np.flatnonzero(np.isin(found[image_K], store.places))
        batches = pair_batches(image_K[own], texts.mask_ML.sum(axis=1)[text_K[own]], self._task.pair_batch_size)
        logit_K = np.empty(len(own), np.float32)
        for place_GT in track(self._run, batches, "match", len(batches)):
            patch_GPD = store.patches(found[image_K[own[place_GT[:, 0]]]].tolist())
            logit_B2 = self._model.itm_logits(patch_GPD, *texts.tensors(text_K[own[place_GT.ravel()]]))
            logit_K[place_GT.ravel()] = logit_B2[:, 1].astype("float32").numpy()
        return gather_array(self._run.context, own, [logit_K], np.arange(len(pair_K)))

    def _predictions(
        self, samples: Sequence[CaptionSample], texts: Texts, texts_of: Reranked, images_of: Reranked
    ) -> list[dict[str, Any]]:
        """A row per image with its best texts, then one per text with its best images."""
        originals = [text for sample in samples for text in sample.captions]

        def about(image: int) -> dict[str, Any]:
            sample = samples[image]
            return {"image_id": sample.image_id, "name": sample.image.name, "image": None}

        stage, owner_M, image_N = self._run.stage, texts.owner_M, np.arange(len(samples))
        rows = []
        for image, (sample, own) in enumerate(zip(samples, right_candidates(image_N, owner_M), strict=True)):
            rank, best = _best(texts_of, image, own)
            found = [{"text": originals[text], **entry} for text, entry in best]
            rows.append({"stage": stage, "group": sample.group, **about(image), "rank": rank, "retrieved_texts": found})
        for text, owner in enumerate(owner_M.tolist()):
            rank, best = _best(images_of, text, np.array([owner]))
            found = [{**about(image), **entry} for image, entry in best]
            own = {"text": originals[text], "image_id": samples[owner].image_id, "rank": rank}
            rows.append({"stage": stage, "group": samples[owner].group, **own, "retrieved_images": found})
        shown = [row for groups in shown_searches(rows).values() for group in groups for row in group.items]
        first = [entry["image_id"] for row in shown for entry in (row, *row.get("retrieved_images", ())[:FOUND])]
        pictures = save_pictures(self._run, samples, first)
        for row in rows:
            for entry in (row, *row.get("retrieved_images", ())):
                if "image" in entry:
                    entry["image"] = pictures.get(entry["image_id"])
        return rows


def _best(ranking: Reranked, query: int, right: np.ndarray) -> tuple[int, list[tuple[int, dict[str, Any]]]]:
    """The place of the best `right` candidate, counted from 1, and the first candidates: place, and what is said of them."""
    row_C = ranking.row(query)
    order = largest(row_C, _SHOWN).tolist()
    matched, rights = set(ranking.shortlist_RS[query].tolist()), set(right.tolist())
    best = [
        (
            place,
            {
                "score": float(row_C[place]) if place in matched else None,
                "similarity": float(ranking.similarity_RC[query, place]),
                "right": place in rights,
            },
        )
        for place in order
    ]
    return 1 + np.count_nonzero(row_C > row_C[right].max()), best


def _together(reranked: Mapping[str, Hits], by_contrast: Mapping[str, Hits]) -> dict[str, float]:
    """Both, per group, with their mean and intervals; contrast alone is called itc_."""
    metrics = {}
    for group, found in reranked.items():
        for prefix, own in (("", found), ("itc_", by_contrast[group])):
            ends = own.intervals()
            for name, value in {**own.recalls(), "r_mean": own.r_mean()}.items():
                metrics[metric_key(prefix + name, scope=group)] = value
                metrics |= interval_metrics(prefix + name, ends[name], scope=group)
        metrics[metric_key("chance", scope=group)] = found.chance()  # of any order
    return metrics
