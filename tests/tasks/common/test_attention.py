"""Pictures of where the queries look: hot where the map is, of any shape of picture, few of many."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from blip2x.tasks.common.attention import MOST_LOOKS, draw_looks, looks_file, most_different, picture_looks, write_looks

DARK, BRIGHT = (68, 1, 84), (253, 231, 37)  # the ends of viridis


def one_hot(*patches, of=16, token=0.5):
    """A query per patch that looks at that one and at the class token."""
    share_QP = np.zeros((len(patches), 1 + of))
    share_QP[:, 0] = token
    share_QP[np.arange(len(patches)), 1 + np.array(patches)] = 1 - token
    return share_QP


def heated(colour):
    return tuple(round(0.6 * channel) for channel in colour)  # over black


@pytest.mark.parametrize(("size", "shown"), [((40, 40), (320, 320)), ((40, 20), (320, 160)), ((300, 200), (300, 200))])
def test_hot_where_all_queries_look(size, shown):
    """Patch 6 of 4 x 4 is the third of the second row."""
    sheet = np.asarray(picture_looks(Image.new("RGB", size), one_hot(6, 6, 6, 6)))
    width, height = shown
    assert sheet.shape[0] > height and sheet.shape[1] > width
    large = sheet[:height, :width].astype(int)
    hot = np.abs(large - heated(BRIGHT)).max(axis=-1) <= 1
    assert (hot | (np.abs(large - heated(DARK)).max(axis=-1) <= 1)).all()
    expected = np.zeros((height, width), bool)
    expected[height // 4 : height // 2, width // 2 : 3 * width // 4] = True
    np.testing.assert_array_equal(hot, expected)


def test_single_queries_are_beside_in_their_own_colours():
    sheet = np.asarray(picture_looks(Image.new("RGB", (320, 320)), one_hot(3, 3, 12, 15))).astype(int)
    side = sheet[:320, 324:]
    middles = [[side[place * 108 + row, column] for row, column in ((13, 93), (93, 13), (93, 93))] for place in range(3)]
    hot = [[np.abs(pixel - heated(BRIGHT)).max() <= 1 for pixel in panel] for panel in middles]
    assert np.array_equal(hot, np.eye(3, dtype=bool))


def test_the_class_token_takes_no_heat_away():
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    maps = [np.asarray(picture_looks(picture, one_hot(1, 9, token=token)))[:320] for token in (0, 0.9)]
    np.testing.assert_array_equal(*maps)
    assert picture_looks(picture, one_hot(1, token=1)).size == picture_looks(picture, one_hot(1)).size


def test_the_most_different_queries():
    maps = one_hot(0, 0, 5, 0, 9, token=0)[:, 1:]
    maps[1] = 0.9 * maps[1] + 0.1 * maps[2]
    assert most_different(maps, 3) == [0, 2, 4]
    assert most_different(maps[:2], 3) == [0, 1] and most_different(maps[:1], 3) == [0]
    assert most_different(np.full((4, 16), 1 / 16), 3) == [0, 1, 2]  # all alike


def test_files_are_written_where_the_patches_form_a_square(run):
    copy = io.BytesIO()
    Image.new("L", (8, 8)).save(copy, "PNG")
    assert write_looks(run, 7, looks_file(copy.getvalue(), one_hot(3))) == "attention/7.png"
    with Image.open(run.folder / "attention/7.png") as image:
        assert image.format == "PNG" and image.width > 320
    assert looks_file(copy.getvalue(), one_hot(3, of=15)) is None


def test_few_are_drawn_from_many_and_each_time_the_same():
    assert draw_looks(range(5)) == set(range(5)) and draw_looks([]) == set()
    drawn = draw_looks(range(0, 10_000, 4))
    assert len(drawn) == MOST_LOOKS and drawn == draw_looks(range(0, 10_000, 4)) and {place % 4 for place in drawn} == {0}
    assert max(drawn) > 5000  # not the first ones
