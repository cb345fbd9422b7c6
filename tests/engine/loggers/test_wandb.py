"""Weights & Biases: offline for real, without any network; whatever fails, the run goes on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from blip2x.engine.loggers.none import NoLogger

from blip2x.config.run import WandbConfig
from blip2x.engine.loggers.wandb import WandbLogger
from blip2x.registry import LOGGERS


def build(folder, warn, mode="offline"):
    cfg = WandbConfig(kind="wandb", project="p", entity=None, mode=mode, tags=["t"])
    return LOGGERS.get("wandb")(cfg, folder=folder, name="my run", config={"seed": 1}, warn=warn)


class FakeRun:
    """Writes down what it is told; `broken` names the methods that fail."""

    def __init__(self, *broken):
        self.calls, self.broken = [], broken

    def __getattr__(self, method):
        def call(*words, **named):
            self.calls.append((method, *words, *named.values()))
            if method in self.broken:
                raise OSError(f"{method} failed")

        return call


def test_offline_run_is_written_below_the_run_folder(tmp_path):
    warnings = []
    logger = build(tmp_path, warnings.append)
    logger.log("stage1", 1, {"loss": 2.0})
    logger.log("caption", 1, {"CIDEr": 0.5})  # another stage starts again at step 1
    logger.close()
    assert isinstance(logger, WandbLogger) and warnings == []
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_every_stage_counts_its_own_steps():
    run = FakeRun()
    logger = WandbLogger(run, warn=print)
    for stage, step in (("a", 5), ("a", 10), ("b", 5)):
        logger.log(stage, step, {"loss": 1.0})
    logger.close()
    assert run.calls == [
        ("define_metric", "a/*", "a/step"),
        ("log", {"a/step": 5, "a/loss": 1.0}),
        ("log", {"a/step": 10, "a/loss": 1.0}),
        ("define_metric", "b/*", "b/step"),
        ("log", {"b/step": 5, "b/loss": 1.0}),
        ("finish",),
    ]


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_when_it_fails_there_is_one_warning_and_no_further_try(method):
    run, warnings = FakeRun(method), []
    logger = WandbLogger(run, warnings.append)
    for step in (1, 2):
        logger.log("s", step, {"loss": 1.0})
    logger.close()
    logger.close()
    assert warnings == [f"Weights & Biases stopped ({method} failed); the run goes on, its numbers are in metrics.jsonl"]
    assert sum(call[0] == method for call in run.calls) == 1


def test_not_logged_in_is_a_warning_and_nothing_is_asked(tmp_path, monkeypatch):
    asked = []
    fake = SimpleNamespace(login=lambda prompt: asked.append(prompt) or False, init=pytest.fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    warnings = []
    assert isinstance(build(tmp_path, warnings.append, mode="online"), NoLogger)
    assert asked == [False] and "not logged in: run `wandb login`, or choose logger.mode=offline" in warnings[0]


def test_login_knows_the_argument_that_keeps_it_from_asking():
    import inspect

    import wandb

    assert "prompt" in inspect.signature(wandb.login).parameters


def test_without_the_package_there_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises
    warnings = []
    assert isinstance(build(tmp_path, warnings.append), NoLogger)
    assert len(warnings) == 1 and "did not start" in warnings[0]
