"""The configs that docs/tutorials.md has people write compose."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.load import load_config

PAGE = Path(__file__).resolve().parents[2] / "docs/tutorials.md"


@pytest.fixture
def conf(tmp_path):
    """conf/ with what the page adds to it."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF_FOLDER, folder)
    text = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(r"```yaml\n *# conf/(\S+)\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(re.sub(r"^   ", "", content, flags=re.MULTILINE))
    return folder


def composed(conf: Path, *words: str):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return load_config(compose("config", overrides=list(words)), list(words))


def test_a_data_set_of_ones_own(conf):
    cfg = composed(conf, "task=caption", "dataset=mine", "model=tiny_opt")
    assert (cfg.dataset.kind, cfg.dataset.name, cfg.dataset.train_captions) == ("custom", "mine", "train.json")
    assert not cfg.dataset.transform.flip and cfg.dataset.transform.crop_scale is None


def test_another_size_of_opt(conf):
    language = composed(conf, "task=pretrain_stage2", "model=opt1.3b", "dataset=coco_vg").model.language
    assert (language.kind, language.width, language.depth, language.num_heads) == ("opt", 2048, 24, 32)
    assert language.weights == language.tokenizer == "weights/opt-1.3b"
