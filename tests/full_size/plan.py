"""Step times on this CPU beside those that the formulas of blip2x/models/plan foretell from a few others.

    python tests/full_size/plan.py

The share of the peak that each part's products get is worked out from three measurements with two samples each: the image
encoder's way there, a step of stage 1, a step of stage 2. From these, and from the measured peak of a product and speed of
memory, the formulas foretell other steps. Times are CPU seconds of one thread, the least of several rounds in which all take
turns, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from blip2x.startup import prepare_process

if __name__ == "__main__":
    prepare_process(threads=1)

import numpy as np
import paddle

from blip2x.config.compose import compose_config
from blip2x.config.run import RunConfig
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.flops import vision_count
from blip2x.models.freeze import freeze, set_train_mode
from blip2x.models.plan.assumptions import Machine
from blip2x.models.plan.estimate import Estimate, Training, estimate
from blip2x.models.plan.traffic import Layout
from blip2x.optim.build import build_optimizer
from blip2x.parallel.degrees import Degrees
from blip2x.tasks.checkup.memory import Texts
from tests.full_size.memory import TwoSteps, objective_of

ROUNDS = 4
LENGTH, OUTPUT = 16, 12
WORDS = {"qformer": 1000, "language": 1000}  # where the config leaves it to the tokenizer
STAGE1, STAGE2 = "task=pretrain_stage1", "task=pretrain_stage2"
CALIBRATED = {"stage 1, small, 2 samples": (STAGE1, "model=small", 2), "stage 2, small, 2 samples": (STAGE2, "model=small", 2)}
FORETOLD = {
    "stage 1, small, 1 sample": (STAGE1, "model=small", 1),
    "stage 1, small, 4 samples": (STAGE1, "model=small", 4),
    "stage 2, small, 4 samples": (STAGE2, "model=small", 4),
    "stage 1, tiny, 64 samples": (STAGE1, "model=tiny_opt", 64),
    "stage 2, tiny OPT, 64 samples": (STAGE2, "model=tiny_opt", 64),
    "stage 2, tiny T5, 64 samples": (STAGE2, "model=tiny_t5", 64),
}


class Work:
    """A training's step, to be repeated."""

    def __init__(self, task: str, model: str, rows: int):
        words = ["task.contrast_steps=0", "optim.warmup_steps=0"] if task == STAGE1 else ["optim.warmup_steps=0"]
        self.cfg: RunConfig = compose_config([task, model, *words, f"task.batch_size={rows}"])
        cfg, output = self.cfg, OUTPUT if self.cfg.model.language.kind == "t5" and task == STAGE2 else 0
        self.training = Training(cfg.model, cfg.task, rows, LENGTH, output, vocab_sizes=WORDS)
        built = build_stage1(cfg.model, vocab_size=1000) if task == STAGE1 else build_stage2(cfg.model, vocab_size=1000)
        for part in ("vision", "language"):
            if hasattr(built, part):
                freeze(getattr(built, part))
        self.model, self.objective = built, objective_of(cfg, built)
        set_train_mode(self.objective)
        self.optimizer, _ = build_optimizer(cfg.optim, self.objective, 100)
        arrays = TwoSteps(cfg, Texts(LENGTH, output, WORDS), {}).batch(rows)
        self.batch = {name: paddle.to_tensor(array) for name, array in arrays.items()}

    def step(self) -> None:
        """One."""
        if hasattr(self.objective, "set_step"):
            self.objective.set_step(0)
        (batch,) = self.objective.prepare([self.batch])
        self.objective(batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.clear_grad()

    def see(self) -> None:
        """The image encoder alone."""
        with paddle.no_grad():
            self.model.vision(self.batch["image_BCHW"])

    def foretold(self, machine: Machine) -> Estimate:
        """By the formulas."""
        return estimate(self.training, machine, Layout(Degrees(1, 1)), 1, memory=False)


def seconds(actions: dict[str, Callable[[], None]]) -> dict[str, float]:
    """CPU seconds of each, the least of all rounds after a first one."""
    found = {}
    for number in range(ROUNDS + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            spent = time.process_time() - begin
            if number:
                found[name] = min(found.get(name, spent), spent)
    return found


def bare_machine() -> Machine:
    """This one: the peak of a product, and how fast memory is copied."""
    side, numbers = 1536, 2**25
    matrix, source, target = paddle.randn([side, side]), np.ones(numbers, np.float32), np.zeros(numbers, np.float32)
    found = seconds({"product": lambda: paddle.matmul(matrix, matrix), "copy": lambda: np.copyto(target, source)})
    peak, copied = 2 * side**3 / found["product"], 2 * 4 * numbers / found["copy"]
    return Machine("this CPU", peak, 1e15, copied, 1.0, 1.0, 1, "measured here", overhead=0.0)


def fitted(machine: Machine, works: dict[str, Work], found: dict[str, float]) -> Machine:
    """With the shares of the peak that the measurements show, one part after the other."""
    first, second = (works[name] for name in CALIBRATED)
    shares = dict.fromkeys(("vision", "qformer", "language"), 1.0)
    rows = first.training.samples
    shares["vision"] = vision_count(first.cfg.model.vision).forward * rows / (found["see"] * machine.peak)
    for part, work, name in zip(("qformer", "language"), (first, second), CALIBRATED, strict=True):
        layout = Layout(Degrees(1, 1))
        operations = {key: sum(both) for key, both in work.training.operations(layout, work.training.batch(layout, 1)).items()}
        others = sum(count / (machine.peak * shares[key]) for key, count in operations.items() if key != part)
        if part == "qformer":
            others -= operations["language"] / machine.peak  # there is none
        left = found[name] - others - work.foretold(machine).update
        shares[part] = operations[part] / (machine.peak * left)
    return replace(machine, utilisation=shares)


def main() -> None:
    """Print both."""
    paddle.seed(0)
    works = {name: Work(*what) for name, what in {**CALIBRATED, **FORETOLD}.items()}
    first = next(iter(works.values()))
    machine = bare_machine()
    found = seconds({"see": first.see, **{name: work.step for name, work in works.items()}})
    machine = fitted(machine, works, found)
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in machine.utilisation.items())
    print(f"peak {machine.peak / 1e9:.0f} GFLOP/s, memory {machine.memory_speed / 1e9:.1f} GB/s; of the peak: {shares}")
    against = next(iter(CALIBRATED))
    print(f"seconds as a multiple of those of {against}, {found[against]:.2f}:")
    for name, work in works.items():
        ratios = work.foretold(machine).step / works[against].foretold(machine).step, found[name] / found[against]
        kind = "fitted" if name in CALIBRATED else "foretold"
        print(f"{name:32} {kind:9} {ratios[0]:6.2f}  measured {ratios[1]:6.2f}  {100 * (ratios[0] / ratios[1] - 1):+5.0f} %")


if __name__ == "__main__":
    main()
