"""How much faster stage 1 is where the image encoder's features are kept: `python tests/full_size/features.py [BATCH]`.

With `model=small` and the texts' length of `digits`, on one thread: a step with pixels, and one with features that are read
from a cache on disk, in turn. Seconds are this process's own CPU time, the shortest of each, so that other work on the machine
counts little. The step with pixels leaves out opening the pictures.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from blip2x.config.compose import compose_config
from blip2x.startup import prepare_process

REPEATS, WORDS = 3, 120


def main(batch: int) -> None:
    prepare_process(1)
    import paddle

    from blip2x.data.feature_store import FeatureStore, identity_of
    from blip2x.models.assemblies.stage1 import build_stage1
    from blip2x.models.freeze import freeze, set_train_mode
    from blip2x.objectives.stage1 import Stage1Objective
    from blip2x.optim.build import build_optimizer
    from blip2x.parallel.context import Context
    from blip2x.tasks.common.features import row_shape

    cfg = compose_config(["model=small", "task=pretrain_stage1", "dataset=digits"])
    paddle.seed(0)
    model = build_stage1(cfg.model, vocab_size=WORDS)
    freeze(model.vision)
    objective = Stage1Objective(model, Context(), cfg.task, dec_id=1)
    set_train_mode(objective)
    optimizer, _ = build_optimizer(cfg.optim, objective, 100)
    texts = paddle.randint(2, WORDS, [batch, cfg.task.max_txt_len])
    rest = {"image_id_B": paddle.arange(batch), "text_ids_BL": texts, "text_mask_BL": paddle.ones_like(texts)}
    image_BCHW = paddle.randn([batch, 3, cfg.model.vision.image_size, cfg.model.vision.image_size])
    identities = [identity_of(str(number)) for number in range(batch)]

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), row_shape(cfg.model.vision), {})
        identity_MI = np.frombuffer(b"".join(identities), np.uint8).reshape(batch, -1)
        store.add(identity_MI, model.vision(image_BCHW).astype("float16").numpy())

        def step(kept: bool, done: int) -> float:
            started = time.process_time()
            if kept:
                row_BPD = np.stack([store.look(identity).row_PD for identity in identities])
                images = {"encoded_BPD": paddle.to_tensor(row_BPD).astype("float32")}
            else:
                images = {"image_BCHW": image_BCHW}
            objective.set_step(done)
            (prepared,) = objective.prepare([{**images, **rest}])
            objective(prepared)["loss"].backward()
            optimizer.step()
            optimizer.clear_grad()
            return time.process_time() - started

        for name, done in (("contrast alone", 0), ("all three losses", cfg.task.contrast_steps)):
            pixels, features = zip(*[(step(False, done), step(True, done)) for _ in range(REPEATS)], strict=True)
            with_pixels, with_features = min(pixels), min(features)
            ratio = with_pixels / with_features
            print(f"{name}: {with_pixels:.2f} s with pixels, {with_features:.2f} s with features: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
