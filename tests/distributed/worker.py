"""One rank of several small trainings, one after the other: `worker.py <folder> <plan>`; writes what came out to rank<n>.json.

The plan is JSON: a list of [name, kind, settings]. Kind "fit" trains by `blip2x.engine.fit`, "loop" by a loop of its own that
writes weights and optimizer state down in the middle, or begins there. Layout "single" is what the ranks are compared with;
each process works it out for itself.
"""

import json
import os
import sys
import time
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process(threads=1)

import numpy as np
import paddle
from paddle import nn

from blip2x.config.run import (
    Device,
    HybridConfig,
    OptimConfig,
    PathsConfig,
    PrecisionConfig,
    PrecisionName,
    RunConfig,
)
from blip2x.config.task import Best, OnNan, PretrainVisionConfig
from blip2x.engine.fit import Training
from blip2x.engine.run import Run
from blip2x.models.freeze import freeze
from blip2x.optim.build import build_optimizer
from blip2x.parallel import sharding
from blip2x.parallel.context import Context
from blip2x.parallel.seeding import seed_everything
from blip2x.parallel.strategies import hybrid
from blip2x.parallel.tensor_ops import reduce_from
from tests.distributed import gloo_bridge

SAMPLES, STEPS, HALF = 8, 6, 3  # samples of one optimizer step, over all ranks and micro-batches
SKIPPED, LATE = 1, 2  # a step that is left out, as one with a nan is; the first one that trains all parameters
# the bound cuts and eps is not small beside the gradients, so that a wrong mean or norm shows in the weights
OPTIM = {"lr": 0.05, "warmup_start_lr": 0.05, "warmup_steps": 0, "eta_min": 0.01, "weight_decay": 0.1, "layer_decay": 1.0}
OPTIM |= {"beta1": 0.9, "beta2": 0.98, "eps": 1e-3, "clip_grad_norm": 0.3}


class Front(nn.Layer):
    """A frozen matrix of which each rank of a tensor group has some rows."""

    def __init__(self, group):
        super().__init__()
        whole, rows = nn.Linear(6, 8), 6 // group.size
        self.group, self.rows = group, slice(group.rank * rows, (group.rank + 1) * rows)
        zeros = nn.initializer.Constant(0.0)  # draws nothing: what comes later is drawn alike, however many rows these are
        self.weight = self.create_parameter([rows, 8], default_initializer=zeros)
        self.weight.set_value(whole.weight[self.rows])
        self.bias = whole.bias
        if group.size > 1:
            self.weight.share = True  # other ranks have other numbers
        freeze(self)

    def forward(self, hidden):
        part = paddle.matmul(hidden[:, self.rows], self.weight)
        return (reduce_from(part, self.group) if self.group.size > 1 else part) + self.bias


class Objective(nn.Layer):
    """A frozen front and two trained encoders; "pairs" must find each other among all ranks' samples, "alone" looks at each."""

    gradients_vary = True

    def __init__(self, context, loss):
        super().__init__()
        self.context, self.loss, self.step = context, loss, 0
        self.front = Front(context.tensor)
        self.image = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        self.text = nn.Linear(6, 4)
        self.late = nn.Linear(4, 4)
        self.temp = self.create_parameter([1], default_initializer=nn.initializer.Constant(0.5))

    def set_step(self, step):
        self.step = step

    def forward(self, batch):
        image_BE, text_BE = self.image(self.front(batch["image"])), self.text(batch["text"])
        if self.step >= LATE:
            text_BE = self.late(text_BE)
        if self.loss == "alone":
            return {"loss": (image_BE - text_BE / self.temp).pow(2).mean()}
        text_KE = self.context.all_gather_with_grad(text_BE)
        target_B = paddle.arange(len(image_BE)) + self.context.data_rank * len(image_BE)
        return {"loss": nn.functional.cross_entropy(image_BE @ text_KE.T / self.temp, target_B)}


class Batches:
    """The same samples per step, dealt out to micro-batches and data ranks."""

    def __init__(self, context, accumulate):
        random = np.random.default_rng(0)
        self.data = [
            {name: random.normal(size=(SAMPLES, 6)).astype("float32") for name in ("image", "text")} for _ in range(STEPS)
        ]
        self.context, self.accumulate, self.samples = context, accumulate, []
        self.images, self.loading_seconds = 0, 0.0

    def set_epoch(self, epoch, first=0):
        assert (epoch, first) == (0, 0)

    def __len__(self):
        return STEPS * self.accumulate

    def __iter__(self):
        for step in range(STEPS):
            yield from self.of(step)

    def of(self, step):
        ranks = self.context.data_size
        size = SAMPLES // (ranks * self.accumulate)
        for micro in range(self.accumulate):
            first = (micro * ranks + self.context.data_rank) * size
            self.samples = list(range(first, first + size))
            yield {name: values[first : first + size] for name, values in self.data[step].items()}


def start(context, loss):
    """The objective; what is trained comes from rank 0, whatever the others drew."""
    seed_everything(0, rank=0)
    objective = Objective(context, loss)
    if not context.is_main:
        objective.text.weight.set_value(objective.text.weight + 1)
    seed_everything(0, context.data_rank)
    return objective


def trained(objective):
    return {name: p for name, p in objective.named_parameters() if not p.stop_gradient}


def numbers(tensors):
    return {name: tensor.numpy().ravel().tolist() for name, tensor in tensors.items()}


def join(layout):
    if layout == "single":
        return Context()
    degrees = {"dp": 1, "sharding": 1, "sharding_stage": 0, "tp": 1, "tp_vision": False} | layout
    return hybrid.build(HybridConfig(**degrees), Device.cpu)


def by_fit(folder, *, layout, loss, accumulate):
    context = join(layout)
    task = PretrainVisionConfig(
        batch_size=1,
        accumulate=accumulate,
        max_steps=STEPS,
        max_epochs=None,
        log_every=2,
        eval_every=None,
        eval_batch_size=1,
        on_nan=OnNan.stop,
        save_every=None,
        keep_last=1,
        keep_best=0,
        best_metric=None,
        best_is=Best.max,
        save_in_background=False,
    )
    cfg = RunConfig(task=task, optim=OptimConfig(**OPTIM), logger={}, run_name=None, overwrite=False)
    # each process is a run of its own where it trains alone
    outputs = folder / (f"alone{paddle.distributed.get_rank()}" if layout == "single" else "runs")
    cfg.paths, cfg.model.name, cfg.dataset.name, cfg.resume = PathsConfig(outputs=str(outputs)), "tiny", "tiny", "never"
    cfg.precision = PrecisionConfig(name=PrecisionName.fp32, loss_scale=1.0, loss_scale_steps=1)
    run = Run.create(cfg, context, sys.argv)
    objective = start(context, loss)
    batches = Batches(context, accumulate)

    def evaluate():
        """Shares of an evaluation may be unequal."""
        return {"seen": float(sum(objective.image(paddle.ones([1, 8])).shape[0] for _ in range(1 + context.rank)))}

    stage = {"stage": "train", "precision": cfg.precision, "evaluate": evaluate}
    result = Training(objective, batches, task, cfg.optim, context, run, **stage).fit()
    lines = len((run.folder / "metrics.jsonl").read_text().splitlines()) if context.is_main else None
    return {"weights": numbers(trained(objective)), "metrics": result, "folder": str(run.folder), "lines": lines}


def by_loop(folder, *, layout, loss, accumulate, begin_with=None, write=None):
    """All steps, of which the file `write` is written half-way; or those after the file `begin_with`, which was."""
    context = join(layout)
    objective = start(context, loss)
    optimizer, schedule = build_optimizer(OptimConfig(**OPTIM), objective, STEPS)
    objective.image[0].weight.optimize_attr["learning_rate"] = 0.5  # as layer-wise decay of the rate does
    parameters, state = trained(objective), None
    if begin_with:
        stored = dict(np.load(folder.parent / f"{begin_with}.npz"))
        for name, parameter in parameters.items():
            parameter.set_value(stored.pop(f"weights/{name}"))
        state = stored
    wrapped, optimizer = context.wrap(objective, optimizer)
    if state is not None:
        context.set_optimizer_state(wrapped, optimizer, parameters, state)
        schedule.step(HALF)
    batches, losses, norms, early = Batches(context, accumulate), [], [], None
    for step in range(HALF if begin_with else 0, STEPS):
        objective.set_step(step)
        micro = [{name: paddle.to_tensor(values) for name, values in batch.items()} for batch in batches.of(step)]
        total = 0.0
        for batch in micro[:-1]:
            with context.accumulating(wrapped):
                part = wrapped(batch)["loss"] / accumulate
                part.backward()
            total += float(part)
        part = wrapped(micro[-1])["loss"] / accumulate
        part.backward()
        grads = sum(parameter.grad is not None for parameter in parameters.values())
        losses.append(context.mean(total + float(part)))
        norms.append(float(context.grad_norm(wrapped, optimizer, list(parameters.values()))))
        if step != SKIPPED:
            optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step == LATE - 1:
            context.gather_parameters(wrapped)
            early = numbers({"late": objective.late.weight})
        if step == HALF - 1 and write:
            context.gather_parameters(wrapped)
            arrays = context.optimizer_state(wrapped, optimizer, parameters)
            if paddle.distributed.get_rank() == 0:
                arrays |= {f"weights/{name}": parameter.numpy() for name, parameter in parameters.items()}
                np.savez(folder.parent / f"{write}.npz", **arrays)
    held = {
        "gradients": grads,
        "states": len(optimizer._accumulators["moment1"]),
        "slices": len(wrapped.sliced) if isinstance(wrapped, sharding.SlicedLayer) else 0,
    }
    context.gather_parameters(wrapped)
    return {"losses": losses, "norms": norms, "weights": numbers(parameters), "early": early, "held": held}


def late(folder, *, layout, seconds):
    """Rank 0 works alone for longer than gloo waits."""
    context = join(layout)
    context.on_main(lambda: time.sleep(seconds))
    return context.gather_objects(context.rank)


def collectives(folder, *, layout):
    """What the ranks tell each other; half precision and whole numbers included."""
    context = join(layout)

    def fail():
        raise ValueError("said by rank 0")

    try:
        context.on_main(fail)
        error = None
    except ValueError as caught:
        error = str(caught)
    rows = {
        dtype: context.all_gather(paddle.full([2, 1], context.data_rank).astype(dtype)).astype("int64").flatten().tolist()
        for dtype in ("float32", "bfloat16", "int64", "bool")
    }
    return {
        "data_rank": [context.data_rank, context.data_size],
        "mean": context.mean(float(context.data_rank)),
        "total": int(context.total(paddle.to_tensor(context.data_rank + 1))),
        "any": [context.any(context.rank == context.world_size - 1), context.any(False)],
        "gather_objects": context.gather_objects({"rank": context.data_rank}),
        "broadcast_object": context.broadcast_object({"rank": context.rank}),
        "all_gather": rows,
        "on_main": error,
        "differing": {name: refuses_to_wrap(context, name) for name in ("bias", "weight")},
    }


def refuses_to_wrap(context, name):
    """Whether the last rank's other numbers in a frozen parameter are noticed."""
    objective = start(context, "alone")
    if context.rank == context.world_size - 1:
        parameter = getattr(objective.front, name)
        parameter.set_value(parameter + 1)
    try:
        context.wrap(objective, build_optimizer(OptimConfig(**OPTIM), objective, STEPS)[0])
    except RuntimeError as caught:
        return "frozen parameters differ" in str(caught)
    return False


def main(folder, plan):
    kinds = {"fit": by_fit, "loop": by_loop, "collectives": collectives, "late": late}
    kinds["bridge"] = lambda folder: gloo_bridge.build()
    sharding.SEGMENT_SIZE = 50  # else nothing here is big enough for stage 3
    found = {name: kinds[kind](folder, **settings) for name, kind, settings in plan}
    rank = paddle.distributed.get_rank()
    partial = folder / f".rank{rank}.json"
    partial.write_text(json.dumps(found))
    partial.rename(folder / f"rank{rank}.json")
    paddle.distributed.barrier()
    os._exit(0)  # now and then paddle's gloo crashes while the interpreter shuts down, after everything is done


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
