from __future__ import annotations

import copy

import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.data.feature_store import LEAST_SPARE
from blip2x.engine.checkpoint import checkpoint_bytes
from blip2x.engine.checkpoints import Checkpoints
from blip2x.tasks.common import train as train_module
from blip2x.tasks.common.train import _left_to, note_samples


def test_going_on_with_other_samples_is_told(run):
    note_samples(run, 5)
    run.goes_on = True
    note_samples(run, 5)
    assert run.console.file.getvalue() == ""
    for _ in range(2):  # each time, until there are as many as at the beginning
        note_samples(run, 4)
    assert run.console.file.getvalue().count("this run began with 5 samples, and now there are 4") == 2


@pytest.mark.parametrize("same", [True, False])
def test_features_leave_room_to_the_checkpoints_that_are_not_there_yet(run, tmp_path, monkeypatch, same):
    cfg = copy.deepcopy(compose_config(["task=pretrain_stage1", f"paths.cache={tmp_path}/cache"]))
    cfg.task.keep_last, cfg.task.keep_best = 2, 1
    monkeypatch.setattr(
        train_module, "same_disk", lambda cache, folder: same and (cache, folder) == (tmp_path / "cache", run.folder)
    )
    checkpoints, model = Checkpoints(run, cfg.task, lambda: None), nn.Linear(1, 1)
    spare = _left_to(checkpoints, cfg, run, model)
    if not same:
        assert spare is None
        return
    assert spare() == LEAST_SPARE
    monkeypatch.setattr(train_module, "LEAST_SPARE", 0)
    assert spare() == 4 * checkpoint_bytes(model, optimizer=True)
    (run.folder / "checkpoint").mkdir()
    (run.folder / "checkpoint/model").write_bytes(bytes(1000))
    assert spare() == 4 * checkpoint_bytes(model, optimizer=True) - 1000
