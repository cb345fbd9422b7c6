"""How long a training is, and its learning rate over the steps."""

from __future__ import annotations

from dataclasses import fields

from blip2x.config.run import OptimConfig
from blip2x.config.task import TrainingConfig
from blip2x.data.sequences import epoch_length
from blip2x.engine.steps import count_steps
from blip2x.errors import UserError
from blip2x.optim.schedule import learning_rate
from blip2x.tasks.checkup.data import epoch_batches, train_samples
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings, sentence

_COLUMNS, _ROWS = 60, 6  # of the plot
_BLOCKS = " ▁▂▃▄▅▆▇█"
# (task, image encoder or family of the language model) -> samples per step, for a rate of 1e-4 (paper, section 3.4)
_PUBLISHED = {
    ("pretrain_stage1", "clip_vit"): 2320,
    ("pretrain_stage1", "eva_vit"): 1680,
    ("pretrain_stage2", "opt"): 1920,
    ("pretrain_stage2", "t5"): 1520,
}
_FACTOR = 2  # samples per step further from the published ones than this are worth a look


def plot(rates: list[float], steps: int) -> list[str]:
    """`rates`, evenly over `steps`, as columns of blocks, with both axes."""
    top = max(rates) or 1.0
    label = f"{top:.3g}"
    eighths = [round(rate / top * 8 * _ROWS) for rate in rates]
    text = []
    for row in reversed(range(_ROWS)):
        cells = "".join(_BLOCKS[min(8, max(0, height - 8 * row))] for height in eighths)
        text.append(f"{label if row == _ROWS - 1 else '0' if row == 0 else '':>8} │{cells}")
    last = f"step {steps:,}"
    return [*text, f"{'':8} └{'─' * len(rates)}", f"{'':10}{'1':<{max(len(rates) - len(last), 2)}}{last}"]


def check_schedule(examined: Examined) -> Findings:
    """Steps, epochs, samples per step, warm-up, and the rates as a plot."""
    out, cfg, layout = Findings(examined.name), examined.cfg, examined.layout
    task, optim = cfg.task, cfg.optim
    per_step = task.batch_size * task.accumulate * layout.data_ranks
    try:
        samples = epoch_length(train_samples(examined))
    except UserError as error:
        samples, why = None, sentence(error)
    if samples is None:
        if task.max_steps is None:
            out.look("steps", f"{task.max_epochs} epochs of an unknown number of samples: {why}", "make the data set ready")
            return out
        total, said = task.max_steps, ""
    else:
        total = count_steps(task, epoch_batches(examined, samples))
        said = f", {total * per_step / samples:.3g} epochs of {samples:,} samples"
    shared = "1 rank" if layout.data_ranks == 1 else f"{layout.data_ranks} ranks with samples of their own"
    rule = f"task.batch_size={task.batch_size} x task.accumulate={task.accumulate} x {shared}"
    out.fine("steps", f"{total:,}{said}; {per_step:,} samples per step ({rule})")
    shape = {field.name: getattr(optim, field.name) for field in fields(OptimConfig) if field.name in _SHAPE}
    columns = min(_COLUMNS, total)
    places = [round(index * (total - 1) / max(columns - 1, 1)) for index in range(columns)]
    rates = [learning_rate(step, **shape, total_steps=total) for step in places]
    out.shown = plot(rates, total)
    _judge_warmup(out, optim, total)
    _judge_rate(out, examined, per_step)
    _judge_intervals(out, task, total)
    out.record = {"schedule": {**shape, "total_steps": total, "samples_per_step": per_step, "samples": samples}}
    return out


_SHAPE = ("lr", "warmup_start_lr", "warmup_steps", "eta_min")


def _judge_warmup(out: Findings, optim: OptimConfig, total: int) -> None:
    share = optim.warmup_steps / total
    said = f"{optim.warmup_steps:,} steps, {100 * share:.3g} % of the training; peak {optim.lr:g}, end {optim.eta_min:g}"
    if optim.warmup_steps >= total:
        out.look("warm-up", f"{said}: the peak is never reached", f"lower optim.warmup_steps below {total}, or train longer")
    else:
        out.fine("warm-up", said)


def _judge_rate(out: Findings, examined: Examined, per_step: int) -> None:
    cfg = examined.cfg
    part = cfg.model.vision.kind if examined.stage == "stage1" else cfg.model.language.kind
    wanted = _PUBLISHED.get((cfg.task.kind, part))
    if wanted is None or cfg.model.name.startswith("tiny"):
        return
    fitting = 1e-4 * per_step / wanted  # the linear rule
    said = f"{cfg.optim.lr:g} with {per_step:,} samples per step; published: 1e-4 with {wanted:,}"
    if 1 / _FACTOR <= fitting / cfg.optim.lr <= _FACTOR:
        out.fine("learning rate", said)
    else:
        advice = f"in proportion it would be {fitting:.1e}; or reach {wanted:,} with task.accumulate or more ranks"
        out.look("learning rate", said, advice)


def _judge_intervals(out: Findings, task: TrainingConfig, total: int) -> None:
    """Longer than the training, they do nothing."""
    never = [
        f"task.{name}={getattr(task, name)}"
        for name in ("eval_every", "save_every", "log_every")
        if (getattr(task, name) or 0) > total
    ]
    if never:
        out.look("intervals", f"{', '.join(never)} of {total:,} steps: only at the end", "lower them if that is not meant")
