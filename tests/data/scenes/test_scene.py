import pytest

from blip2x.data.scenes.scene import PlacedDigit, SceneLottery, held_out_combinations, relations

COLOURS = ["red", "green", "blue"]


def placed(row, column):
    return PlacedDigit(3, "red", row, column, source=0)


def test_relations_have_both_axes_and_their_distances():
    assert relations(placed(0, 0), placed(1, 2)) == {"left of": 2, "above": 1}
    assert relations(placed(1, 2), placed(0, 0)) == {"right of": 2, "below": 1}
    assert relations(placed(2, 1), placed(0, 1)) == {"below": 2}


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_every_digit_and_colour_keeps_a_combination(count):
    held_out = held_out_combinations(COLOURS, count=count, seed=1)
    assert len(held_out) == count
    kept = {(digit, colour) for digit in range(10) for colour in COLOURS} - held_out
    assert {digit for digit, _ in kept} == set(range(10)) and {colour for _, colour in kept} == set(COLOURS)


def test_scenes_have_distinct_digits_colours_and_cells():
    lottery = SceneLottery(sources={d: [10 * d] for d in range(10)}, colours=COLOURS, grid=3, max_digits=3, seed="0")
    scenes = [lottery.draw() for _ in range(300)]
    for scene in scenes:
        count = len(scene.digits)
        for values in zip(*((p.digit, p.colour, (p.row, p.column)) for p in scene.digits), strict=True):
            assert len(set(values)) == count
        assert all(p.source == 10 * p.digit and 0 <= p.row < 3 and 0 <= p.column < 3 for p in scene.digits)
    counts = [sum(len(scene.digits) == n for scene in scenes) for n in (1, 2, 3)]
    assert min(counts) > 70  # each is likely 100 times


def test_held_out_scenes_are_told_apart():
    held_out = held_out_combinations(COLOURS, count=20, seed=0)  # all but ten
    lottery = SceneLottery(sources={d: [0] for d in range(10)}, colours=COLOURS, grid=3, max_digits=3, seed="0")
    for _ in range(20):
        assert not lottery.draw_where(held_out, wanted=False).combinations & held_out
        assert lottery.draw_where(held_out, wanted=True).combinations & held_out
