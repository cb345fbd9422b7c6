"""The audit as a command: what it leaves behind, and settings out of range."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.tasks.common import launch as launch_module
from blip2x.tasks.common.launch import launch


def test_audit_leaves_figures_page_and_bad_images(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module, "write_report", lambda folder: folder)  # other tests read it
    images = tmp_path / "images"
    images.mkdir()
    Image.linear_gradient("L").save(images / "a.png")
    rows = [{"image": "a.png", "caption": "a gradient"}, {"image": "gone.png", "caption": "nothing"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    words = ["task=audit", "dataset=custom", f"dataset.images={images}", f"dataset.train_captions={tmp_path / 'train.json'}"]
    words += ["dataset.num_workers=0", f"paths.outputs={tmp_path}", f"paths.cache={tmp_path}", "run_name=run"]
    results = launch(compose_config(words), words)
    run = tmp_path / "run"
    figures = json.loads((run / "audit.json").read_text(encoding="utf-8"))
    verdicts = {(line["where"], line["check"]): line["verdict"] for line in figures["verdicts"]}
    assert verdicts["train", "images are there"] == "broken" and verdicts["train", "images open"] == "fine"
    # tokenizers that would be made of the data set's words count one token a word, and what begins and ends a text
    tokens = figures["splits"]["train"]["captions"]["tokens"]
    assert {part: found["max"] for part, found in tokens.items()} == {"Q-Former": 4, "language model": 4}
    assert (run / "bad_images.txt").read_text(encoding="utf-8") == f"train: image {images}/gone.png does not exist\n"
    assert "gone.png" in (run / "audit.html").read_text(encoding="utf-8")
    found = results["audit"]
    assert (found["images"], found["missing_images"], found["broken_images"], found["broken"]) == (2, 1, 0, 1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.open_images=some", "task.open_images must be all or a number of images"),
        ("task.open_images=-1", "task.open_images must be all or a number of images"),
        ("task.near=9", "task.near must be from 0 to 8 bits, got 9"),
        ("task.max_txt_len=2", "task.max_txt_len must be at least 3"),
        ("task.sheet=-1", "task.sheet must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(word, message, tmp_path):
    with pytest.raises(UserError, match=message):
        launch(compose_config(["task=audit", word, f"paths.outputs={tmp_path}"]), ["run"])
    assert not any(tmp_path.iterdir())
