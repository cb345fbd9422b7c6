"""Predicted and measured memory of one training step at full size, with random weights.

    python tests/full_size/memory.py task.of=pretrain_stage1 model=opt2.7b "task.overrides=['task.batch_size=4']"
    python tests/full_size/memory.py task.of=pretrain_stage2 model=opt2.7b "task.overrides=['task.batch_size=1']"   # 17 GB

The words are those of task=doctor. It prints the tensors and the resident size of the process, each predicted and measured.
As in a training, a checkpoint is written after the last step; with task.save_in_background=true already after the first.
"""

from __future__ import annotations

import gc
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from blip2x.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

import paddle
from paddle import nn
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.config.run import RunConfig
from blip2x.config.task import trains
from blip2x.engine.checkpoint import prepare_checkpoint
from blip2x.engine.checkpoints import Checkpoints
from blip2x.engine.fit import Training
from blip2x.engine.loggers import Loggers
from blip2x.engine.memory import peak_memory_mib
from blip2x.engine.run import Run
from blip2x.engine.training_state import TrainingState
from blip2x.models.memory.predict import Layout, Prediction
from blip2x.objectives.answering import AnsweringObjective
from blip2x.objectives.language import LanguageObjective
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.objectives.vision import VisionObjective
from blip2x.parallel.context import Context
from blip2x.tasks.checkup.examined import looked_at
from blip2x.tasks.checkup.memory import Texts, label_classes, prediction_of, texts_of

ALLOCATED = ("Allocated", 0)  # what tensors take, on the CPU


def allocated() -> int:
    """Bytes of all tensors of this process now."""
    return paddle.base.core.host_memory_stat_current_value(*ALLOCATED)


def most_allocated() -> int:
    """The most of them since `forget_most`."""
    return paddle.base.core.host_memory_stat_peak_value(*ALLOCATED)


def forget_most() -> None:
    """Begin to look for the most anew."""
    paddle.base.core.host_memory_stat_reset_peak_value(*ALLOCATED)


class TwoSteps:
    """Batches of one sample for a first step, which makes gradients and the optimizer's state, then whole ones."""

    def __init__(self, cfg: RunConfig, texts: Texts, classes: dict[str, int]):
        self.cfg, self.texts, self.classes = cfg, texts, classes
        self.samples: list[int] = []
        self.images, self.loading_seconds = 0, 0.0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """There is one."""

    def __len__(self) -> int:
        return 2 * self.cfg.task.accumulate

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for number, rows in enumerate((1, self.cfg.task.batch_size)):
            for micro_batch in range(self.cfg.task.accumulate):
                if number and not micro_batch:
                    gc.collect()
                    forget_most()
                yield self.batch(rows)

    def batch(self, rows: int) -> dict[str, np.ndarray]:
        """Random pictures and texts that fill all of their length."""
        kind, vision, t = self.cfg.task.kind, self.cfg.model.vision, self.texts
        side = vision.image_size // vision.patch_size
        image = {"image_BCHW": np.ones((rows, 3, vision.image_size, vision.image_size), np.float32)}
        if kind == "pretrain_vision":
            return image | {f"label_{name}_BP": np.ones((rows, side**2), np.int64) for name in self.classes}

        def text(name: str, length: int, axis: str = "BL") -> dict[str, np.ndarray]:
            return {f"{name}_ids_{axis}": np.full((rows, length), 5), f"{name}_mask_{axis}": np.ones((rows, length), np.int64)}

        if kind == "pretrain_stage1":
            return (
                image
                | {"image_id_B": np.arange(rows), "target_place_N": np.arange(rows * (t.length - 1))}
                | text("text", t.length)
            )
        words = text("input", t.length) | text("output", t.output_length, "BT") if t.output_length else text("text", t.length)
        place = np.arange(rows * (t.output_length or t.length))
        if not t.output_length:
            place = place[place % t.length > 0]  # bos is no target
            words["label_mask_BL"] = (np.arange(t.length) > 0) * words["text_mask_BL"]
        words["target_place_N"] = place
        if kind == "vqa_finetune":
            words |= text("question", t.question_length, "BK")
        return words if kind == "pretrain_language" else image | words


def objective_of(cfg: RunConfig, model: nn.Layer) -> nn.Layer:
    """As the tasks make it."""
    kind = cfg.task.kind
    if kind == "pretrain_stage1":
        return Stage1Objective(model, Context(), cfg.task, dec_id=3)
    others = {"pretrain_vision": VisionObjective, "pretrain_language": LanguageObjective, "vqa_finetune": AnsweringObjective}
    return others.get(kind, Stage2Objective)(model)


def fill(model: nn.Layer) -> None:
    """Give the parameters of `model` memory, with the same few random numbers again and again: to draw all takes minutes."""
    block = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02
    for name, parameter in model.named_parameters():
        if name == "temp":
            values = np.full(parameter.shape, 0.07, np.float32)
        elif parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            values = np.ones(parameter.shape, np.float32)
        else:
            values = np.resize(block, parameter.shape)
        paddle.to_tensor(values)._share_buffer_to(parameter)


def step(cfg: RunConfig, *, saves: bool = False) -> tuple[Prediction, int]:
    """What is predicted for a step of `cfg`, and the most bytes of tensors that its training loop was measured to have.

    With `saves` the loop writes checkpoints, too: their copies are numpy's, not tensors.
    """
    gc.collect()
    before = allocated()
    layout, texts = Layout.of(cfg, 1), texts_of(cfg)
    classes = label_classes(cfg)
    found, model = prediction_of(cfg, layout, texts)
    fill(model)
    cfg.task.max_steps, cfg.task.max_epochs, cfg.task.eval_every, cfg.optim.warmup_steps = 2, None, None, 0
    if cfg.task.kind == "pretrain_stage1":
        cfg.task.contrast_steps = 0  # the steps after these take most
    cfg.task.save_every = 1 if cfg.task.save_in_background else None  # the second step is beside what is written then

    def prepare(folder: Path, state: TrainingState, *, copy: bool) -> Callable[[], Path]:
        origin = {"vision": "random numbers", "language": "random numbers"}
        about = {"kind": cfg.task.kind, "step": state.step, "frozen_origin": origin}
        return prepare_checkpoint(folder, model, **about, state=state, copy=copy)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), Path(folder), cfg.task.kind, Context(), Console(file=io.StringIO()), Loggers())
        loader = TwoSteps(cfg, texts, classes)
        options = {"precision": cfg.precision, "checkpoints": Checkpoints(run, cfg.task, prepare) if saves else None}
        Training(objective_of(cfg, model), loader, cfg.task, cfg.optim, Context(), run, stage="step", **options).fit()
    return found, most_allocated() - before


def main(words: list[str]) -> None:
    """Print both."""
    wanted = looked_at(compose_config(["task=doctor", *words]).task)
    for name, cfg in ((name, each.cfg) for name, each in wanted.items() if trains(each.cfg.task)):
        found, measured = step(cfg, saves=True)
        for what, predicted, value in (
            ("tensors", found.peak, measured),
            ("process", found.resident, peak_memory_mib() * 2**20),
        ):
            difference = 100 * (predicted / value - 1)
            print(f"{name}: {what} predicted {predicted / 2**30:.2f} GiB, measured {value / 2**30:.2f}: {difference:+.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
