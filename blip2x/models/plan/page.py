"""The tables of docs/scaling.md: ``python -m blip2x.models.plan.page docs/scaling.md`` makes them anew; tests hold it to that.

A table stands between the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what is around them is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from blip2x.config.compose import compose_config
from blip2x.models.plan import assumptions
from blip2x.models.plan.assumptions import GIB, MACHINES, PAPER_MACHINE, Machine
from blip2x.models.plan.choose import recommend
from blip2x.models.plan.estimate import Training, wire
from blip2x.models.plan.table import cells, compared, hours, markdown, name, recommended
from blip2x.models.plan.traffic import Layout
from blip2x.parallel.degrees import Degrees

# The paper's steps (section 3.4), on 129 million pairs that are not public. A caption of at most 32 tokens is split for T5:
# half of it is read, half of it is written.
RECIPES = {
    "stage 1, ViT-g": ("pretrain_stage1_vitg", 1680, 250_000, 32, 0),
    "stage 1, ViT-L": ("pretrain_stage1_vitl", 2320, 250_000, 32, 0),
    "stage 2, ViT-g and OPT-2.7B": ("pretrain_stage2_opt2.7b", 1920, 80_000, 32, 0),
    "stage 2, ViT-g and FlanT5-XL": ("pretrain_stage2_flant5xl", 1520, 80_000, 16, 16),
    "stage 2, ViT-g and FlanT5-XXL": ("pretrain_stage2_flant5xxl", 1520, 80_000, 16, 16),
}
SHOWN = ("stage 1, ViT-g", "stage 2, ViT-g and OPT-2.7B", "stage 2, ViT-g and FlanT5-XL")
PAPER_DAYS = {"stage 1, ViT-g": 6, "stage 2, ViT-g and FlanT5-XXL": 3}  # "less than", for the largest models


@cache
def training(recipe: str) -> Training:
    """One of `RECIPES`."""
    experiment, samples, steps, length, output_length = RECIPES[recipe]
    cfg = compose_config([f"experiment={experiment}"])
    return Training(cfg.model, cfg.task, samples, length, output_length, steps=steps)


def assumed() -> list[str]:
    """The tables of what is taken for granted."""
    rows = []
    for key, one in {**MACHINES, "": PAPER_MACHINE}.items():
        rows.append(
            [
                f"{one.title}{f' (`{key}`)' if key else ''}",
                f"{one.peak / 1e12:.0f}",
                f"{one.memory / GIB:.0f}",
                f"{one.memory_speed / 1e12:.2f}",
                f"{one.inside / 1e9:.0f}",
                f"{one.outside / 1e9:.0f}" if one is not PAPER_MACHINE else "",
                str(one.node),
                one.source,
            ]
        )
    columns = ("GPU", "TFLOP/s, bf16", "GiB", "TB/s", "GB/s in a node", "GB/s out of it", "of a node", "source")
    own = assumptions
    shares = ", ".join(f"{part} {percent(share)}" for part, share in own.UTILISATION.items())
    pictures = ", ".join(f"{1000 * cost:.1f} ms at {side} pixels" for side, cost in own.PICTURE_SECONDS.items())
    return [
        *markdown(rows, columns),
        "",
        f"- Of the peak, products get: {shares}. A guess, below the 44 % of Megatron-LM on A100 (arXiv 2104.04473, table 1).",
        f"- {percent(own.MEMORY_USED)} of the memory are for tensors.",
        f"- Of the memory's speed {percent(own.MEMORY_SPEED_USED)} are got, of a link's {percent(own.LINK_USED)}.",
        f"- An exchange takes at least {1e6 * own.LATENCY:.0f} µs for each doubling of its ranks. In "
        f"{1000 * own.STEP_OVERHEAD:.0f} ms of a step nothing is computed.",
        f"- Behind {percent(own.OVERLAP)} of the last micro-batch's way back through what is trained, gradients' sums hide.",
        f"- AdamW moves {own.UPDATE_BYTES} bytes per trained number.",
        f"- A training picture takes a core {pictures} (docs/pipeline.md).",
    ]


def percent(share: float) -> str:
    """For readers."""
    return f"{100 * share:.0f} %"


def recipe_tables(recipe: str) -> list[str]:
    """What is recommended for it on each machine."""
    of = training(recipe)
    lines = [f"{of.samples:,} samples per step, {of.steps:,} steps."]
    for machine in MACHINES.values():
        rows = [cells(of, count, found) for count, found in recommended(of, machine).items()]
        lines += ["", f"On {machine.title}:", "", *markdown(rows)]
    return lines


def layout_table(recipe: str, machine: Machine, count: int) -> list[str]:
    """Every layout beside each other."""
    of = training(recipe)
    return markdown(cells(of, count, found, layout) for layout, found in compared(of, machine, count).items())


def traffic_table(recipe: str, machine: Machine, layout: Layout) -> list[str]:
    """What goes between ranks in a step."""
    of, rows = training(recipe), []
    batch = of.batch(layout, 1)
    for one in of.traffic(layout, batch):
        size, seconds = wire(one, machine, layout)
        wait = "hidden" if one.hidden else f"{1000 * seconds:.1f}"
        rows.append([one.name, one.operation, f"{one.bytes / 2**20:,.2f}", f"{size / 2**20:,.1f}", str(one.calls), wait])
    return markdown(rows, ("what", "how", "MiB handed in", "MiB through a link", "calls", "ms"))


def paper_table() -> list[str]:
    """Beside what the paper says."""
    rows = []
    for recipe, days in PAPER_DAYS.items():
        of = training(recipe)
        found = recommend(of, PAPER_MACHINE, 16)
        planned = hours(of, found) / 24
        used = f"{name(found.layout)}, {found.batch.rows} x {found.batch.accumulate}"
        needed = percent(found.peak_share * planned / days)
        rows.append(
            [recipe, used, f"{found.memory / GIB:.1f}", f"{planned:.1f}", f"< {days}", percent(found.peak_share), needed]
        )
    columns = (
        "training",
        "layout",
        "GiB",
        "days, planned",
        "days, paper",
        "of peak, planned",
        "of peak that the paper's days need",
    )
    return markdown(rows, columns)


LARGEST = "stage 2, ViT-g and FlanT5-XXL"
BLOCKS: dict[str, Callable[[], list[str]]] = {
    "assumed": assumed,
    **{recipe: lambda recipe=recipe: recipe_tables(recipe) for recipe in SHOWN},
    "layouts": lambda: layout_table(LARGEST, MACHINES["a100_40gb"], 16),
    "traffic of stage 1": lambda: traffic_table("stage 1, ViT-g", MACHINES["a100_40gb"], Layout(Degrees(16, 1))),
    "traffic of tp2": lambda: traffic_table(LARGEST, MACHINES["a100_40gb"], Layout(Degrees(8, 1, 2))),
    "paper": paper_table,
}


def renewed(page: str, names: list[str] | None = None) -> str:
    """The page with the tables `names`, None: all, as they are now."""
    for block in BLOCKS if names is None else names:
        begin, end = f"<!-- begin {block} -->", f"<!-- end {block} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page lacks {begin} or {end}")
        text = "\n".join([begin, *BLOCKS[block](), end])
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda found, text=text: text, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
