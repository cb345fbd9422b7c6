"""Several loggers at once: one that fails leaves the others and the run alone."""

from __future__ import annotations

import sys

import pytest

from blip2x.config.logger import LoggerConfig
from blip2x.engine.loggers import Loggers, reason


class Recorder:
    """Writes down what it is told; `broken` is the method that fails."""

    def __init__(self, broken=None):
        self.calls, self.broken = [], broken

    def __getattr__(self, method):
        def call(*words):
            self.calls.append(method)
            if method == self.broken:
                raise OSError(f"{method}\n failed")

        return call


def use(loggers, tmp_path):
    loggers.log("s", 1, {"loss": 1.0})
    loggers.table("s", 1, "predictions", [], tmp_path)
    loggers.log("s", 2, {"loss": 1.0})
    loggers.finish({})
    loggers.close(failed=False)
    loggers.close(failed=False)


@pytest.mark.parametrize("method", ["log", "table", "finish", "close"])
def test_one_that_fails_is_one_warning_and_the_others_go_on(method, tmp_path):
    broken, whole, said = Recorder(method), Recorder(), []
    use(Loggers({"broken": broken, "whole": whole}, said.append), tmp_path)
    assert said == [
        f"warning: logger=broken stopped ({method} failed); the run goes on without it, its numbers are in metrics.jsonl"
    ]
    assert broken.calls[-1] == "close" and broken.calls.count(method) == broken.calls.count("close") == 1
    assert whole.calls == ["log", "table", "log", "finish", "close"]


@pytest.mark.parametrize("module", ["wandb", "tensorboardX"])
def test_one_that_does_not_start_is_a_warning(module, tmp_path, config, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # an import of it raises
    monkeypatch.delitem(sys.modules, "blip2x.engine.loggers.tensorboard", raising=False)
    monkeypatch.setattr("blip2x.registry.LOGGERS._builders", {})
    kind, said = {"tensorboardX": "tensorboard"}.get(module, module), []
    run = {"folder": tmp_path, "config": {"task": {"kind": "caption"}}, "goes_on": False, "say": said.append}
    loggers = Loggers.build({kind: config(kind), "x": LoggerConfig("none_of_ours", 0)}, **run)
    assert len(loggers) == 0 and len(said) == 2
    assert said[0].startswith(f"warning: logger={kind} did not start (") and module in said[0]


def test_a_page_as_an_error_is_part_of_a_line():
    assert reason(OSError("<html>\n" + "x" * 900)) == "<html> " + "x" * 193 + "..."
    assert reason(TimeoutError()) == "TimeoutError"


def test_nothing_is_imported_that_was_not_chosen():
    import subprocess

    words = "import sys, blip2x.engine.loggers, blip2x.config.load; print(sorted({'wandb', 'tensorboardX'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "[]\n"
