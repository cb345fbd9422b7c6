"""The page has every verdict, shows pictures, needs nothing else, and takes what users write for text."""

from __future__ import annotations

import re
import shutil

import pytest

from blip2x.data.audit.page import audit_page
from blip2x.data.audit.verdicts import judge
from blip2x.data.sources.digits import Digits
from blip2x.data.tokenize import train_tokenizer


@pytest.fixture
def page(look):
    def make(source, **changes):
        found, _ = look(source, **changes)
        return audit_page(found, judge(found.figures), {"Finished": "today"}), judge(found.figures)

    return make


def test_page_shows_verdicts_and_pictures(custom, picture, page, tmp_path):
    picture("a.png", 1)
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / "b.png")
    rows = [{"image": name, "caption": "<script>alert(1)</script> a cat"} for name in ("a.png", "b.png", "gone.png")]
    source = custom(train_captions=rows, eval_captions=rows[:1])
    html, lines = page(source, tokenizers={"Q-Former": train_tokenizer([], "bert")})
    assert len(re.findall(r'class="mark (fine|look|broken)"', html)) == len(lines) > 5
    assert html.count("data:image/jpeg") == 5  # of train and of eval, drawn by lot, and the copies in train
    assert "By name <small>1</small>" in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "gone.png" in html


def test_page_of_a_data_set_of_which_nothing_is_there(custom, page):
    html, _ = page(custom(train_captions=[{"image": "a.png", "caption": "a cat"}], eval_captions="[]"))
    assert "cannot be opened" not in html and "data:image" not in html and "has no entries" in html


def test_page_of_painted_pictures(digits_config, page):
    digits_config.train_scenes, digits_config.test_scenes = 6, 4
    html, _ = page(Digits(digits_config), open_images=0)
    assert html.count("data:image/jpeg") == 8  # four of each split; val is eval


def test_a_phone_shows_the_page_whole(digits_config, page, browser, tmp_path):
    digits_config.train_scenes, digits_config.test_scenes = 6, 4
    html, lines = page(Digits(digits_config), open_images=0)
    (tmp_path / "audit.html").write_text(html, encoding="utf-8")
    shown = browser.new_page(viewport={"width": 390, "height": 844})
    shown.goto((tmp_path / "audit.html").as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    assert shown.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)") == [True] * 8
    # each verdict can be read without moving its table sideways
    verdicts = shown.evaluate(
        "[...document.querySelectorAll('#verdicts .mark')].map(each => each.getBoundingClientRect().right)"
    )
    assert len(verdicts) == len(lines) and max(verdicts) <= 390
    shown.close()
