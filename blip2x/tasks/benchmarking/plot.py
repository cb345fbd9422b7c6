"""A picture of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which would look for a screen
from matplotlib.ticker import LogLocator, NullFormatter

from blip2x.tasks.benchmarking.curves import Curve

_PANELS = 2  # side by side
_SIZE = 6.4, 3.4  # inches of a panel and its legend
_TITLES = {
    "batch": "samples per rank and step",
    "image_tokens": "patches of an image",
    "text_length": "tokens of a text",
    "queries": "queries",
    "new_tokens": "new tokens per text",
    "images": "images",
    "operations": "entries",
}


def write_plot(curves: Sequence[Curve], path: Path) -> None:
    """A panel per kind of size: the fastest repeat at each size, both axes logarithmic, so that a power is a straight line."""
    sizes = list(dict.fromkeys(curve.size for curve in curves))
    columns = min(_PANELS, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, size in zip(panels, sizes, strict=False):
        own = [curve for curve in curves if curve.size == size]
        panel.set_prop_cycle(color=colormaps["tab20" if len(own) > 10 else "tab10"].colors)
        for curve in own:
            panel.loglog(curve.sizes, curve.fastest, marker="o", markersize=4, label=f"{curve.of}: {curve.exponent:.2f}")
        ticks = sorted({size for curve in own for size in curve.sizes})
        panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(_TITLES[size])
        panel.set_ylabel("seconds")
        panel.grid(alpha=0.3, which="major")
        outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
        panel.legend(title="exponent", fontsize="small", title_fontsize="small", **outside)
    for panel in panels[len(sizes) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
