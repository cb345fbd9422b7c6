"""Scoring stage 1: which text belongs to which image, by the contrast's similarity.

N images, M texts, Q queries, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from blip2x.config.run import RunConfig
from blip2x.data.collate import ImageCollate
from blip2x.data.samples import CaptionSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.evaluate import track
from blip2x.engine.run import Run
from blip2x.metrics.retrieval import chance_recall, recall_at_k
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.tasks.common.loading import eval_loader, eval_transform, finish_evaluation


@paddle.no_grad()
def evaluate_retrieval(
    cfg: RunConfig, run: Run, model: Stage1Model, tokenizer: TextTokenizer, samples: Sequence[CaptionSample]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 from images to texts and back, and what chance gets; all of it also per group of images.

    Each image and each text goes through the model once, on one rank. A group's images and texts are each other's only
    candidates, so that it has its own chance.
    """
    image_NQE = _image_features(cfg, run, model, samples)
    samples = [sample for sample in samples if sample.image_id in image_NQE]
    text_ME, owner_M = _text_features(cfg, run, model, tokenizer, samples)
    similarity_NM = np.stack([(image_NQE[sample.image_id] @ text_ME.T).max(axis=0) for sample in samples])
    image_id_N = np.array([sample.image_id for sample in samples])
    results = {}
    groups = {"": samples, **{f"{group}/": [s for s in samples if s.group == group] for group in _groups(samples)}}
    for prefix, members in groups.items():
        wanted = [sample.image_id for sample in members]
        rows, columns = np.isin(image_id_N, wanted), np.isin(owner_M, wanted)
        found = recall_at_k(similarity_NM[rows][:, columns], image_id_N[rows], owner_M[columns])
        found["chance"] = chance_recall(image_id_N[rows], owner_M[columns])
        results |= {f"{prefix}{name}": value for name, value in found.items()}
    return results


def _groups(samples: Sequence[CaptionSample]) -> list[str]:
    groups = sorted({sample.group for sample in samples} - {""})
    return groups if len(groups) > 1 else []


def _image_features(cfg: RunConfig, run: Run, model: Stage1Model, samples: Sequence[CaptionSample]) -> dict[int, np.ndarray]:
    loader = eval_loader(cfg, run, samples, ImageCollate(eval_transform(cfg)))
    own: dict[int, np.ndarray] = {}
    for batch in track(run, loader, "encode images", len(loader)):
        _, _, image_BQE, _ = model.image_features(to_tensors(batch)["image_BCHW"])
        own.update(zip(batch["image_id_B"].tolist(), image_BQE.astype("float32").numpy(), strict=True))
    finish_evaluation(run, loader, len(own))
    return {image_id: features for rank in run.context.gather_objects(own) for image_id, features in rank.items()}


def _text_features(
    cfg: RunConfig, run: Run, model: Stage1Model, tokenizer: TextTokenizer, samples: Sequence[CaptionSample]
) -> tuple[np.ndarray, np.ndarray]:
    """Features [M, E] of all captions, and the image that each belongs to [M]."""
    texts = [(caption, sample.image_id) for sample in samples for caption in sample.captions]
    size, context = cfg.task.eval_batch_size, run.context
    own = texts[context.rank :: context.world_size]
    features = []
    for start in range(0, len(own), size):
        ids_BL, mask_BL = tokenizer.encode([text for text, _ in own[start : start + size]], max_length=cfg.task.max_txt_len)
        text_BE = model.text_features(paddle.to_tensor(ids_BL), paddle.to_tensor(mask_BL))
        features += list(text_BE.astype("float32").numpy())
    parts = context.gather_objects((features, [image_id for _, image_id in own]))
    return np.stack([row for rows, _ in parts for row in rows]), np.array([i for _, owners in parts for i in owners])
