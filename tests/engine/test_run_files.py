"""A run folder read for its report: damage is noted, and nothing outside of the folder is shown."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from blip2x.engine.run_files import read_run
from blip2x.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\nlr: ${optim.lr}\n")
    return folder


def png(width: int, height: int, noise: bool = False) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if noise else pixels * 0).save(buffer, "PNG")
    return buffer.getvalue()


def test_no_run_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: it has neither config\.yaml nor results\.json"):
        read_run(tmp_path)


def test_what_is_absent_is_empty(folder):
    run = read_run(folder)
    assert run.config == {"seed": 1, "lr": "${optim.lr}"}
    assert (run.results, run.metrics, run.predictions, run.finished, run.notes) == ({}, [], [], "", [])


def test_damaged_files_are_noted_and_the_rest_is_read(folder):
    (folder / "config.yaml").write_text("a: [")
    (folder / "versions.json").write_text("{")
    (folder / "results.json").write_text('{"caption": {"CIDEr": 1.0}}')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n{"st')  # the last line was cut off
    run = read_run(folder)
    assert run.config_text == "a: [" and run.config == {}
    assert run.metrics == [{"step": 1}, {"step": 2}]
    assert run.finished.endswith("UTC")
    assert len(run.notes) == 3 and "metrics.jsonl: 1 line could not be read" in run.notes[2]


def test_predictions_of_stages_come_in_the_order_of_the_results(folder):
    (folder / "results.json").write_text(json.dumps({"vqa_zeroshot": {}, "caption": {}}))
    for stage in ("caption", "vqa_zeroshot", "unknown"):
        (folder / stage).mkdir()
        text = json.dumps({"stage": stage, "text": "one\u2028line"}, ensure_ascii=False)  # a separator inside of a text
        (folder / stage / "predictions.jsonl").write_text(text + "\n", encoding="utf-8")
    assert [row["stage"] for row in read_run(folder).predictions] == ["vqa_zeroshot", "caption", "unknown"]


def test_small_pictures_are_embedded_as_they_are_and_large_ones_smaller(folder):
    (folder / "small.png").write_bytes(png(48, 32))
    (folder / "large.png").write_bytes(png(600, 300, noise=True))
    run = read_run(folder)
    small, large = (run.picture({"image": name, "_folder": folder}) for name in ("small.png", "large.png"))
    assert small.small and base64.b64decode(small.uri.removeprefix("data:image/png;base64,")) == png(48, 32)
    with Image.open(io.BytesIO(base64.b64decode(large.uri.removeprefix("data:image/jpeg;base64,")))) as image:
        assert image.size == (480, 240) and not large.small


@pytest.mark.parametrize(
    "image", ["../secret.png", "/etc/hostname", "absent.png", "text.png", "cut.png", "flipped.png", "", None]
)
def test_what_is_no_picture_of_the_run_is_not_shown(folder, image):
    (folder.parent / "secret.png").write_bytes(png(4, 4))
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(png(200, 200, noise=True)[:5000])
    flipped = bytearray(png(200, 200, noise=True))
    flipped[11] ^= 1  # Pillow answers this with a ValueError
    (folder / "flipped.png").write_bytes(flipped)
    assert read_run(folder).picture({"image": image, "_folder": folder}) is None


def test_a_link_out_of_the_run_is_not_followed(folder):
    (folder.parent / "secret.png").write_bytes(png(4, 4))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert read_run(folder).picture({"image": "link.png", "_folder": folder}) is None


def test_machine_state_and_diff_are_read_where_they_are(folder):
    (folder / "versions.json").write_text('{"blip2x": "1", "hardware": {"cores": 2}}')
    (folder / "status.json").write_text('{"state": "failed", "error": "x", "ended": "2026-01-02T03:04:05+01:00"}')
    (folder / "diff.patch").write_text("diff --git a b\n")
    run = read_run(folder)
    assert (run.versions, run.hardware) == ({"blip2x": "1"}, {"cores": 2})
    assert (run.status["state"], run.ended, run.diff) == ("failed", "2026-01-02 02:04 UTC", "diff --git a b")
    (folder / "versions.json").write_text("{}")
    (folder / "hardware.json").write_text('{"cores": 4}')
    (folder / "status.json").write_text('{"state": "running", "ended": null}')
    assert (read_run(folder).hardware, read_run(folder).ended) == ({"cores": 4}, "")
