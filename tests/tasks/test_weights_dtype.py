"""Texts can be written with weights of fewer bytes, and nothing can be trained with them; the doctor counts their bytes."""

from __future__ import annotations

import json

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.tasks.checkup.memory import model_of, stored_bytes
from blip2x.tasks.common.models import ModelLoader


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_captions_are_written_with_weights_of_fewer_bytes(run_task, trained, small, dtype, monkeypatch):
    models = []
    stage2 = ModelLoader.stage2
    monkeypatch.setattr(ModelLoader, "stage2", lambda *args, **more: models.append(stage2(*args, **more)) or models[-1])
    few = ["task.metrics=[CIDEr]", "task.num_beams=1", "task.max_new_tokens=4", "task.min_new_tokens=1"]
    command = [*small, f"model.weights={trained}/pretrain_stage2/checkpoint", f"task.weights_dtype={dtype}", *few]
    _, folder = run_task("caption", *command)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and any(row["caption"] for row in rows)
    ((model, _),) = models
    types = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    assert types["language.opt.decoder.layers.0.linear1.weight"] == f"paddle.{dtype}"
    assert types["vision.blocks.0.attention.qkv.weight"] == f"paddle.{dtype}"
    assert {kind for name, kind in types.items() if name.startswith("qformer")} == {"paddle.float32"}


@pytest.mark.parametrize("task", ["caption", "vqa_finetune"])
def test_training_through_them_is_refused(task):
    words = [f"task={task}", "task.train=true", "task.weights_dtype=int8"]
    with pytest.raises(UserError, match=r"task\.weights_dtype=int8 is for writing texts only, and task\.train=true trains"):
        compose_config(words)


def test_the_doctor_counts_a_byte_per_number_of_large_models():
    def gigabytes(dtype):
        cfg = compose_config(["task=caption", "model=opt2.7b", "dataset=coco", f"task.weights_dtype={dtype}"])
        vocab_sizes = {"qformer": 30523, "language": cfg.model.language.vocab_size}
        return stored_bytes(model_of(cfg, Layout.of(cfg, 1), vocab_sizes, {})) / 1e9

    full, half, quarter = map(gigabytes, ("float32", "bfloat16", "int8"))
    assert full == pytest.approx(14.98, abs=0.02)  # weights alone
    assert half / full == pytest.approx(0.515, abs=0.01) and quarter / full == pytest.approx(0.275, abs=0.01)
