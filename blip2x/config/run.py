"""The other groups (``parallelism``, ``optim``, ``precision``, ``paths``) and the whole of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Dict, Optional

from omegaconf import MISSING

from blip2x.config.dataset import DatasetConfig
from blip2x.config.logger import LoggerConfig
from blip2x.config.model import ModelConfig
from blip2x.config.schema import schema
from blip2x.config.task import Best, TaskConfig


@dataclass
class ParallelismConfig:
    """How ranks share the work."""

    kind: str = MISSING


@schema("parallelism", "single")
@dataclass
class SingleConfig(ParallelismConfig):
    """One process, no process group."""

    kind: str = "single"


@schema("parallelism", "hybrid")
@dataclass
class HybridConfig(ParallelismConfig):
    """Data parallelism, sharding and tensor parallelism through paddle's fleet; the degrees' product is the number of ranks."""

    kind: str = "hybrid"
    dp: int = MISSING  # data-parallel degree; -1, for one of the three: what the others leave
    sharding: int = MISSING  # ranks that share optimizer state (stage 1), gradients (2), parameters (3)
    sharding_stage: int = MISSING  # 0: no sharding
    tp: int = MISSING  # ranks that share each matrix of the frozen language model
    tp_vision: bool = MISSING  # and of the frozen image encoder


@schema("optim", "adamw")
@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, both per step."""

    lr: float = MISSING  # peak
    warmup_start_lr: float = MISSING  # where the warm-up begins
    warmup_steps: int = MISSING  # optimizer steps from warmup_start_lr to lr
    eta_min: float = MISSING  # where the cosine ends
    weight_decay: float = MISSING  # on matrices only: biases, norms, embeddings of one dimension and scalars are exempt
    beta1: float = MISSING  # of the gradient's running mean
    beta2: float = MISSING  # of the squared gradient's running mean
    eps: float = MISSING  # added to the root of the latter
    clip_grad_norm: Optional[float] = MISSING  # global norm; null: no clipping
    layer_decay: float = MISSING  # of a trained image encoder: a block's rate is this times the next one's; 1: all alike


class PrecisionName(Enum):
    """Types of the arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@schema("precision", "precision")
@dataclass
class PrecisionConfig:
    """What number type the model computes in."""

    name: PrecisionName = MISSING  # fp32 on a CPU; bf16 or fp16 halve activations and frozen weights on a GPU
    loss_scale: float = MISSING  # fp16: what the loss is multiplied by at the start, so that small gradients are not 0
    loss_scale_steps: int = MISSING  # fp16: it is doubled after so many steps without an infinite gradient


@schema("paths", "paths")
@dataclass
class PathsConfig:
    """Folders; each can be set by an environment variable of the same name, e.g. BLIP2X_WEIGHTS."""

    outputs: str = MISSING  # run folders
    data: str = MISSING  # data sets
    weights: str = MISSING  # pretrained models, one folder or file per name; what is missing is fetched into it
    cache: str = MISSING  # what can be made anew at any time
    offline: bool = MISSING  # true: nothing is fetched, and what is missing is said


class Device(Enum):
    """Where to compute."""

    auto = "auto"  # a GPU where there is one and paddle was built for it, else the CPU
    cpu = "cpu"
    gpu = "gpu"


@dataclass
class PruneConfig:
    """Of a sweep: stop a training that is worse than the median of the runs before it at the same step."""

    metric: Optional[str] = MISSING  # STAGE.METRIC of metrics.jsonl; null: nothing is stopped
    best_is: Best = MISSING  # whether a larger or a smaller value is the better one
    min_runs: int = MISSING  # runs before it that have come to the step; with fewer, it goes on
    min_step: int = MISSING  # before this step nothing is stopped


@dataclass
class RunConfig:
    """Everything one run is made of."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logger: Dict[str, LoggerConfig] = field(default_factory=dict)  # by kind
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = MISSING  # of everything that is drawn: weights, order, dropout, crops that are not fixed (dataset.crops)
    run: Optional[str] = None  # a run folder: it is repeated, with its own config; other words change single keys of that
    run_name: Optional[str] = MISSING  # null: task-model-dataset-time
    runs: Any = MISSING  # task=compare: a folder of runs, a run, a pattern (*, ?, [a-z]), or a list of them; null: none
    quiet: bool = MISSING  # true: nothing is printed but warnings, errors and the results table
    sweep: Optional[str] = MISSING  # -m: its name; null: task-model-dataset-time
    objective: Optional[str] = MISSING  # a search's (hydra/sweeper=optuna): STAGE.METRIC of results.json
    objective_of_failed: Optional[float] = MISSING  # what one that failed or was stopped counts as; null: it is left out
    prune: PruneConfig = field(default_factory=PruneConfig)
    overwrite: bool = MISSING  # true: a run folder of the same name is replaced
    resume: str = MISSING  # never | auto (go on with the run of this run_name) | a run folder or checkpoint to go on from
    device: Device = MISSING  # where to compute
    threads: Optional[int] = MISSING  # CPU threads per rank; null: the cores this process may use


schema("root", "run")(RunConfig)
