from __future__ import annotations

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.tasks.common.inputs import build_source


def test_equal_configs_share_a_data_set_and_others_do_not():
    few = ["dataset.train_scenes=5", "dataset.test_scenes=2"]
    first = build_source(compose_config(["task=caption", *few]))
    assert build_source(compose_config(["task=vqa_zeroshot", *few])) is first
    assert build_source(compose_config(["task=caption", *few, "dataset.seed=1"])) is not first


def test_an_error_is_not_remembered(tmp_path):
    cfg = compose_config(["task=caption", "dataset=custom", f"dataset.images={tmp_path}/images"])
    with pytest.raises(UserError, match="images does not exist"):
        build_source(cfg)
    (tmp_path / "images").mkdir()
    assert build_source(cfg).name == "custom"
