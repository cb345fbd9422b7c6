"""One rank of a training: `worker.py <folder> <parallelism> <loss> <accumulate>`; writes rank<n>.json there.

With parallelism `single` it is the training that the ranks are compared with.
"""

import json
import os
import sys
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process(threads=1)

import numpy as np
import paddle
from paddle import nn

from blip2x.config.run import Device, HybridConfig, LoggerConfig, OptimConfig, PathsConfig, RunConfig, SingleConfig
from blip2x.config.task import PretrainVisionConfig
from blip2x.engine.fit import fit
from blip2x.engine.run import Run
from blip2x.models.freeze import freeze
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import STRATEGIES

SAMPLES, STEPS = 8, 6  # samples of one optimizer step, over all ranks and micro-batches
CHOICES = {
    "single": SingleConfig(),
    "dp": HybridConfig(dp=-1, sharding=1, sharding_stage=0),
    "sharding1": HybridConfig(dp=1, sharding=-1, sharding_stage=1),
}
# the bound cuts and eps is not small beside the gradients, so that a wrong mean or norm shows in the weights
OPTIM = {"lr": 0.05, "warmup_start_lr": 0.05, "warmup_steps": 0, "eta_min": 0.01, "weight_decay": 0.1}
OPTIM |= {"beta1": 0.9, "beta2": 0.98, "eps": 1e-3, "clip_grad_norm": 0.3}


class Objective(nn.Layer):
    """A frozen front and two trained encoders; "pairs" must find each other among all ranks' samples, "alone" looks at each."""

    def __init__(self, context, loss):
        super().__init__()
        self.context, self.loss = context, loss
        self.front = nn.Linear(6, 8)
        self.image = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        self.text = nn.Linear(6, 4)
        self.temp = self.create_parameter([1], default_initializer=nn.initializer.Constant(0.5))
        freeze(self.front)

    def forward(self, batch):
        image_BE, text_BE = self.image(self.front(batch["image"])), self.text(batch["text"])
        if self.loss == "alone":
            return {"loss": (image_BE - text_BE / self.temp).pow(2).mean()}
        text_KE = self.context.all_gather_with_grad(text_BE)
        target_B = paddle.arange(len(image_BE)) + self.context.rank * len(image_BE)
        return {"loss": nn.functional.cross_entropy(image_BE @ text_KE.T / self.temp, target_B)}


class Batches:
    """The same samples per step, dealt out to micro-batches and ranks."""

    def __init__(self, context, accumulate):
        random = np.random.default_rng(0)
        self.steps = [
            {name: random.normal(size=(SAMPLES, 6)).astype("float32") for name in ("image", "text")} for _ in range(STEPS)
        ]
        self.context, self.accumulate = context, accumulate

    def __len__(self):
        return STEPS * self.accumulate

    def __iter__(self):
        ranks = self.context.world_size
        size = SAMPLES // (ranks * self.accumulate)
        for step in self.steps:
            for micro in range(self.accumulate):
                first = (micro * ranks + self.context.rank) * size
                yield {name: values[first : first + size] for name, values in step.items()}


def train(folder, parallelism, loss, accumulate):
    context = STRATEGIES.get(CHOICES[parallelism].kind)(CHOICES[parallelism], Device.cpu)
    task = PretrainVisionConfig(
        batch_size=1, accumulate=accumulate, max_steps=STEPS, max_epochs=None, log_every=2, save_every=None, eval_batch_size=1
    )
    cfg = RunConfig(task=task, optim=OptimConfig(**OPTIM), logger=LoggerConfig(kind="none"), run_name=None, overwrite=False)
    cfg.paths, cfg.model.name, cfg.dataset.name = PathsConfig(outputs=str(folder / "runs")), "tiny", "tiny"
    run = Run.create(cfg, context, sys.argv)
    seed_everything(0, rank=0)
    objective = Objective(context, loss)
    if not context.is_main:  # what is trained comes from rank 0, whatever the others drew
        objective.text.weight.set_value(objective.text.weight + 1)
    seed_everything(0, context.rank)
    result = fit(objective, Batches(context, accumulate), task, cfg.optim, context, run, stage="train")
    return {
        "weights": {name: p.numpy().ravel().tolist() for name, p in objective.named_parameters()},
        "metrics": result.metrics,
        "folder": str(run.folder),
        **collectives(context),
    }


def collectives(context):
    def fail():
        raise ValueError("said by rank 0")

    try:
        context.on_main(fail)
        error = None
    except ValueError as caught:
        error = str(caught)
    return {
        "mean": context.mean(float(context.rank)),
        "gather_objects": context.gather_objects({"rank": context.rank}),
        "broadcast_object": context.broadcast_object({"rank": context.rank}),
        "all_gather": context.all_gather(paddle.full([2, 1], float(context.rank))).flatten().tolist(),
        "on_main": error,
    }


def main(folder, parallelism, loss, accumulate):
    found = train(folder, parallelism, loss, accumulate)
    rank = paddle.distributed.get_rank()
    partial = folder / f".rank{rank}.json"
    partial.write_text(json.dumps(found))
    partial.rename(folder / f"rank{rank}.json")
    if parallelism != "single":
        paddle.distributed.barrier()
    os._exit(0)  # now and then paddle's gloo crashes while the interpreter shuts down, after everything is done


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
