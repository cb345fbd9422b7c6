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
