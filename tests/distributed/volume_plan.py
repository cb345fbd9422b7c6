"""What `volume_worker.py` trains, for it and for the test that foretells what it exchanges."""

from blip2x.models.plan.traffic import Batch, Layout
from blip2x.parallel.degrees import Degrees

BATCH = Batch(rows=3, length=7, output_length=5)
WORDS = {"qformer": 61, "language": 67}
LAYOUTS = {
    "dp": Layout(Degrees(2, 1)),
    "sharding1": Layout(Degrees(1, 2), 1),
    "sharding2": Layout(Degrees(1, 2), 2),
    "tp2": Layout(Degrees(1, 1, 2)),
}
CASES = {"dp": ("stage1",), "sharding1": ("stage1",), "sharding2": ("opt",), "tp2": ("opt", "t5")}
TRAININGS = {
    "stage1": ("task=pretrain_stage1", "task.contrast_steps=0", "optim.clip_grad_norm=null"),
    "opt": ("task=pretrain_stage2", "optim.clip_grad_norm=null"),
    "t5": ("task=pretrain_stage2", "model=tiny_t5", "optim.clip_grad_norm=null"),
}


def layout_config(name):
    """The values of `HybridConfig`."""
    layout = LAYOUTS[name]
    own = layout.degrees
    degrees = {"dp": own.dp, "sharding": own.sharding, "tp": own.tp}
    return {**degrees, "sharding_stage": layout.stage, "tp_vision": False}
