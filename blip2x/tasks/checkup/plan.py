"""What the training would take on other numbers of GPUs, and how they should share it; see docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping

from blip2x.config.tools import PlannedOn
from blip2x.engine.folders import write_whole
from blip2x.errors import UserError
from blip2x.models.plan.assumptions import MACHINES
from blip2x.models.plan.estimate import Estimate, Training
from blip2x.models.plan.page import assumed
from blip2x.models.plan.table import COLUMNS, cells, markdown, options, recommended, record
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings
from blip2x.tasks.checkup.memory import label_classes
from blip2x.tasks.common.features import keeps_features

LATER_EPOCHS = (
    "Times and cores are those of later epochs: `dataset.cache=features` keeps what the image encoder gives. The first epoch "
    "takes the encoder's time and cores for its pictures, too. Reading what is kept is not counted."
)
SHOWN = (1, 8, 64, 512)  # GPUs, of those that the files have


def check_plan(examined: Examined, machine: PlannedOn, steps: int | None) -> Findings:
    """Recommend a layout for some numbers of GPUs of `machine`; plan.json and plan.md have more, and all that is assumed.

    `steps` are those of the whole training; None: they are not known.
    """
    out = Findings(examined.name)
    try:
        training = training_of(examined, steps)
    except UserError:
        return out  # the memory's check has said what is missing
    shown, found = MACHINES[machine.value], recommended(training, MACHINES[machine.value])
    later = ", later epochs" if training.keeps_features else ""
    rows = [COLUMNS, *(cells(training, count, found[count]) for count in SHOWN)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    out.shown = [
        f"{examined.name} on {shown.title}, {training.samples:,} samples per step, bfloat16{later}, by arithmetic:",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]
    files = [f"{examined.name}/plan.{kind}" for kind in ("md", "json")]
    write_whole(examined.run.path(examined.name, "plan.md"), "\n".join(page(examined.name, training, found, shown.title)))
    plan = {str(count): record(training, one) for count, one in found.items()}
    examined.run.write_json({"machine": machine.value, "samples": training.samples, "plan": plan}, examined.name, "plan.json")
    out.fine("plan", f"{advice(found)}; no GPU has been asked: {files[0]} says what is assumed, {files[1]} has all numbers")
    out.record = {"plan": {"machine": machine.value, "gpus": plan}}
    return out


def training_of(examined: Examined, steps: int | None) -> Training:
    """What is to be planned."""
    cfg, texts = examined.cfg, examined.texts
    return Training(
        cfg.model,
        cfg.task,
        cfg.task.batch_size * cfg.task.accumulate * examined.layout.data_ranks,
        texts.length,
        texts.output_length,
        texts.question_length,
        texts.vocab_sizes,
        list(label_classes(cfg).values()),
        steps,
        keeps_features(cfg),
    )


def advice(found: Mapping[int, Estimate | None]) -> str:
    """The layouts in words: what to take on which numbers of GPUs."""
    said: dict[str, list[int]] = {}
    for count in SHOWN:
        one = found[count]
        said.setdefault(options(one.layout) if one else "nothing fits, or ranks have no samples,", []).append(count)
    return "; ".join(f"{what} on {', '.join(map(str, counts))}" for what, counts in said.items())


def step_options(training: Training, found: Estimate) -> list[str]:
    """The words of a command that divide a step among a rank's micro-batches."""
    accumulate = found.batch.accumulate
    words = [f"task.batch_size={found.batch.rows}", f"task.accumulate={accumulate}"]
    if training.contrasts:
        words.append(f"task.cached_contrast={str(training.task_for(accumulate).cached_contrast).lower()}")
    return words


def page(title: str, training: Training, found: Mapping[int, Estimate | None], machine: str) -> list[str]:
    """plan.md."""
    rows = [cells(training, count, one) for count, one in found.items()]
    chosen = [
        f"- {count}: " + ", ".join(f"`{words}`" for words in (options(one.layout), *step_options(training, one)))
        for count, one in found.items()
        if one
    ]
    head = [f"# {title} on {machine}", ""]
    if training.keeps_features:
        head += [LATER_EPOCHS, ""]
    return [*head, *markdown(rows), "", *chosen, "", "## What is assumed", "", *assumed(), ""]
