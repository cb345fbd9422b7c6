"""The benchmark's figures for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from blip2x.tasks.benchmarking.curves import Curve
from blip2x.tasks.benchmarking.measure import Measured, Spread

PARTS = {  # in the order of the table; others stand behind them
    "data": "data",
    "vision": "image encoder",
    "qformer_image": "Q-Former: image",
    "qformer_text": "Q-Former: text",
    "qformer_pair": "Q-Former: image and text",
    "qformer_caption": "Q-Former: caption",
    "language": "language model",
    "losses": "heads and losses",
    "backward": "backward",
    "optimizer": "optimizer",
    "prefill": "prefill",
    "decode": "decoding steps",
    "reorder": "reordering of beams",
    "rest": "rest, on the host",
}


def parts_table(found: Measured) -> Table:
    """One row per part, then their sum, then the step without timers."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("part", "median", "min .. max", "share"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    total = sum(found.part(name).median for name in found.parts)
    for name in sorted(found.parts, key=lambda name: [*PARTS, name].index(name)):
        spread = found.part(name)
        table.add_row(PARTS.get(name, name), *_cells(spread), f"{100 * spread.median / total:.1f} %")
    table.add_section()
    table.add_row("sum of the parts", _shown(total), "", "")
    table.add_row(Text("step without timers", style="bold"), *_cells(found.step), f"{100 * found.step.median / total:.1f} %")
    return table


def rates_table(results: Sequence[Measured]) -> Table:
    """One row per task: what comes out per second, memory, and arithmetic."""
    table = Table(title="Rates", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("task", "step", "images/s", "tokens/s", "peak memory", "operations", "per second", "of the peak")
    for name in columns:
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for found in results:
        table.add_row(found.job.name, *_rates(found))
    return table


def curves_table(curves: Sequence[Curve]) -> Table:
    """One row per curve: how the time grows with the size, and how the counted operations do."""
    table = Table(title="Cost against size", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("what grows", "of", "from", "to", "seconds", "exponent", "expected"):
        table.add_column(name, justify="left" if name in ("what grows", "of") else "right", no_wrap=True)
    for curve in curves:
        ends = [f"{curve.sizes[0]:,}", f"{curve.sizes[-1]:,}"]
        seconds = f"{_shown(curve.fastest[0])} .. {_shown(curve.fastest[-1])}"
        table.add_row(curve.size, curve.of, *ends, seconds, f"{curve.exponent:.2f}", f"{curve.expected:.2f}")
    return table


def _rates(found: Measured) -> Iterator[str]:
    step = found.step.median
    yield _shown(step)
    yield f"{found.images / step:,.4g}"
    yield f"{found.tokens / step:,.4g}" if found.tokens else ""
    yield f"{found.memory_gb:.2f} GB" if found.memory_gb is not None else ""
    yield operations(sum(found.flops.values()))
    yield operations(found.flops_per_second)
    yield f"{100 * found.utilisation:.1f} %" if found.utilisation is not None else ""


def operations(count: float) -> str:
    """Multiplications and additions for readers."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count / 1e6:.3g} MFLOP"


def title(found: Measured) -> str:
    """What was measured, and how large it was."""
    amounts = found.amounts
    said = [found.job.name, f"{found.images} images per step"]
    if found.accumulate > 1:
        said.append(f"{found.accumulate} micro-batches")
    said.append(f"{amounts.texts} texts of {amounts.text_tokens} tokens")
    if found.pairs:
        said.append(f"{found.pairs} pairs matched")
    if amounts.new_tokens:
        beams = f" by {amounts.beams} beams" if amounts.beams > 1 else ""
        said.append(f"{amounts.new_tokens} new tokens each{beams}")
    return ", ".join(said)


def _cells(spread: Spread) -> tuple[str, str]:
    return _shown(spread.median), f"{_shown(spread.min)} .. {_shown(spread.max)}"


def _shown(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.2f} s"
