"""What `volume_worker.py` trains, for it and for the test that foretells what it exchanges."""

from blip2x.models.plan.traffic import Batch, Layout
from blip2x.parallel.degrees import Degrees

ROWS, LENGTH, OUTPUT = 3, 7, 5
WORDS = {"qformer": 61, "language": 67}
LAYOUTS = {
    "dp": Layout(Degrees(2, 1)),
    "sharding1": Layout(Degrees(1, 2), 1),
    "sharding2": Layout(Degrees(1, 2), 2),
    "tp2": Layout(Degrees(1, 1, 2)),
}
CASES = (  # layout, training, micro-batches of a step
    ("dp", "stage1", 1),
    ("sharding1", "cached", 2),
    ("sharding2", "opt", 2),
    ("tp2", "opt", 1),
    ("tp2", "t5", 2),
)
TRAININGS = {
    "stage1": ("task=pretrain_stage1", "task.contrast_steps=0", "optim.clip_grad_norm=null"),
    "cached": (
        "task=pretrain_stage1", "task.contrast_steps=0", "task.accumulate=2", "task.cached_contrast=true",
        "optim.clip_grad_norm=null",
    ),
    "opt": ("task=pretrain_stage2", "optim.clip_grad_norm=null"),
    "t5": ("task=pretrain_stage2", "model=tiny_t5", "optim.clip_grad_norm=null"),
}  # fmt: skip


def batch_of(accumulate):
    """Of one rank."""
    return Batch(ROWS, LENGTH, OUTPUT, accumulate=accumulate)


def layout_config(name):
    """The values of `HybridConfig`."""
    layout = LAYOUTS[name]
    own = layout.degrees
    degrees = {"dp": own.dp, "sharding": own.sharding, "tp": own.tp}
    return {**degrees, "sharding_stage": layout.stage, "tp_vision": False}
