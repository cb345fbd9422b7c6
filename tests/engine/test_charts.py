import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from blip2x.engine.charts import line_chart


def corners(svg: str) -> list[list[tuple[float, float]]]:
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="([^"]+)"', svg)]


def test_is_well_formed_and_a_falling_loss_falls():
    svg = line_chart("loss & co", {"loss": [(step, 5 / step) for step in range(1, 50)], "<i>": [(1, 2.0), (9, 1.0)]})
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "loss & co"
    first, last = corners(svg)[0][0], corners(svg)[0][-1]
    assert first[0] < last[0] and first[1] < last[1]  # y grows downwards
    assert "&lt;i&gt; 1" in svg and "<i>" not in svg


def test_points_that_are_no_number_are_left_out():
    svg = line_chart("loss", {"loss": [(1, 3.0), (2, math.nan), (3, math.inf), (4, 1.0)], "all": [(1, math.nan)]})
    assert "nan" not in svg and "inf" not in svg
    assert [len(line) for line in corners(svg)] == [2]


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_nothing_finite_gives_nothing(points):
    assert line_chart("loss", {"loss": points}) == ""


@pytest.mark.parametrize(
    "points", [[(5, 0.3)], [(0, 0.0)], [(0, 0.0), (9, 0.0)], [(1, -2.0), (2, -2.0)], [(1, 1e-9), (2, 1e9)]]
)
def test_a_single_point_and_a_constant_stay_inside_the_picture(points):
    svg = line_chart("loss", {"loss": points})
    _, _, width, height = map(float, ElementTree.fromstring(svg).get("viewBox").split())
    assert all(0 <= x <= width and 0 <= y <= height for line in corners(svg) for x, y in line)


def test_long_curves_are_thinned_and_keep_their_mean():
    svg = line_chart("loss", {"loss": [(step, float(step % 2)) for step in range(3000)]})
    heights = {y for _, y in corners(svg)[0]}
    assert len(corners(svg)[0]) <= 150
    assert len(heights) == 1  # twenty neighbours each, half of them 1


def test_labels_do_not_cover_each_other():
    svg = line_chart(
        "loss", {name: [(1, 1.0), (2, value)] for name, value in (("a", 0.1), ("b", 0.101), ("c", 0.0), ("d", 0.1))}
    )
    heights = sorted(float(y) for y in re.findall(r'</polyline>|<text x="[\d.]+" y="([\d.]+)">', svg) if y)
    assert len(heights) == 4
    assert all(below - above >= 13.9 for above, below in itertools.pairwise(heights))


def test_dots_are_points_as_they_are():
    """Not means of neighbours, which would lie beside a curved line."""
    points = [(step, step**2.0) for step in range(1, 1001)]
    svg = line_chart("rate", {"planned": points, "logged": points}, dots=["logged"])
    planned, logged = ElementTree.fromstring(svg).iter("g")
    (line,) = corners(svg)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in logged.iter("circle")]
    assert len(dots) == 30 and len(list(planned.iter("circle"))) == 1
    assert dots == sorted(dots) and dots[0][0] <= line[0][0] and dots[-1][0] >= line[-1][0]
    scale = (dots[-1][1] - dots[0][1]) / (1000**2 - 1)
    width = (dots[-1][0] - dots[0][0]) / 999
    for x, y in dots:
        step = round((x - dots[0][0]) / width) + 1
        assert y - dots[0][1] == pytest.approx(scale * (step**2 - 1), abs=0.3)


def test_a_single_dot():
    svg = line_chart("rate", {"logged": [(1, 1e-4)]}, dots=["logged"])
    assert svg.count("<circle") == 1 and "polyline" not in svg


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.14159, "3.14"),
        (1234.5, "1,234"),
        (21282.0, "21,282"),
        (2.5e6, "2.5e+06"),
        (0.0424, "0.0424"),
        (0.0, "0"),
        (1e-4, "1e-4"),
        (2.54e-5, "2.5e-5"),
        (-1e-12, "-1e-12"),
    ],
)
def test_the_last_value_is_short_enough_for_its_margin(value, shown):
    assert f">{shown}</text></g>" in line_chart("rate", {"rate": [(1, value)]})
    assert f">plan {shown}</text></g>" in line_chart("rate", {"plan": [(1, value)], "logged": [(1, value)]})


def test_names_of_any_length_stay_inside_the_picture():
    """At about 6.4 units a character; the whole name is in the title."""
    name = "vision.blocks.38.attention"
    svg = line_chart("rate", {name: [(1, 1e-4), (2, 2.5e-5)], "logged": [(1, 1e-4)]})
    width = float(ElementTree.fromstring(svg).get("viewBox").split()[2])
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+">([^<]+)</text></g>', svg)
    assert all(float(x) + 6.4 * len(text) <= width for x, text in labels) and labels[0][1] == "vision.block\u2026 2.5e-5"
    assert f"<title>{name}: " in svg and max(x for line in corners(svg) for x, _ in line) > width / 2


def test_ticks_of_large_counts_fit_the_margin():
    svg = line_chart("tokens", {"tokens": [(1, 0.0), (2, 21282.0)]})
    ticks = re.findall(r'<text class="tick" x="42" [^>]*>([^<]+)<', svg)
    assert ticks == ["0", "10k", "20k", "30k"] or ticks == ["0", "5000", "10k", "15k", "20k", "25k"]
