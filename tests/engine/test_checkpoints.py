"""Which checkpoints a training keeps, what happens when one cannot be written, and which one is gone on from."""

from __future__ import annotations

import threading

import paddle
import pytest
from paddle import nn

from blip2x.config.task import Best, PretrainVisionConfig
from blip2x.engine.checkpoint import prepare_checkpoint
from blip2x.engine.checkpoints import Checkpoints, newest_checkpoint, validations
from blip2x.engine.training_state import Position, TrainingState
from blip2x.errors import UserError
from blip2x.models.weights.manifest import read_manifest
from blip2x.models.weights.tensor_files import open_tensors


def state(step: int) -> TrainingState:
    return TrainingState(
        step, Position(1, 4), 2.5, 0, {}, {"loss": 0.1}, [{"random": {}, "losses": []}], {"w.moment1": paddle.ones([2]).numpy()}
    )


@pytest.fixture
def model():
    return nn.Linear(2, 2)


@pytest.fixture
def made(run, model):
    """`made(keep_last=2)`: the checkpoints of a run that trains `model`."""

    def make(prepare=None, **changes) -> Checkpoints:
        def write(folder, state, *, copy):
            return prepare_checkpoint(folder, model, kind="k", step=state.step, state=state, copy=copy)

        values = {"keep_last": 1, "keep_best": 0, "best_metric": None, "best_is": Best.max, "save_in_background": False}
        return Checkpoints(run, PretrainVisionConfig(**{**values, **changes}), prepare or write)

    return make


def kept(run) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("step-*"))


def test_the_last_and_the_best_are_kept(run, made):
    checkpoints = made(keep_last=2, keep_best=1, best_metric="accuracy")
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.2), (4, float("nan")), (5, 0.3)):
        checkpoints.save(state(step), final=False)
        checkpoints.validated(step, {"accuracy": accuracy})
    assert kept(run) == [2, 4, 5]
    assert checkpoints.best().name == "step-00000002"
    checkpoints.save(state(6), final=True)  # which is the newest of two
    assert kept(run) == [2, 5] and read_manifest(run.folder / "checkpoint")["step"] == 6
    assert validations(run.folder)["2"] == {"accuracy": 0.9}
    checkpoints.validated(6, {"accuracy": 0.95})
    assert checkpoints.best() == run.folder / "checkpoint"


def test_room_is_needed_for_those_that_are_not_there_yet(run, made):
    checkpoints = made(keep_last=1, keep_best=1, best_metric="accuracy")
    assert checkpoints.bytes_to_come(10**6) == 3 * 10**6  # with the one that is written while both others are there
    checkpoints.save(state(1), final=False)
    there = sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*") if path.is_file())
    assert 0 < there == 3 * 10**6 - checkpoints.bytes_to_come(10**6)
    checkpoints.save(state(2), final=True)
    assert checkpoints.bytes_to_come(10**6) < 3 * 10**6 and checkpoints.bytes_to_come(1) == 0


def test_a_damaged_later_one_takes_no_whole_ones_place(run, made):
    """It was passed over when the run went on from step 1."""
    made().save(state(9), final=False)
    (run.folder / "checkpoints/step-00000009/manifest.json").unlink()
    checkpoints = made()
    checkpoints.save(state(2), final=False)
    assert kept(run) == [2]
    assert newest_checkpoint(run.folder, print) == run.folder / "checkpoints/step-00000002"


def test_the_best_may_be_the_smallest(run, made):
    checkpoints = made(keep_best=2, best_metric="loss", best_is=Best.min)
    for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0)):
        checkpoints.save(state(step), final=False)
        checkpoints.validated(step, {"loss": loss})
    assert kept(run) == [1, 2, 4]


@pytest.mark.parametrize("of_state", [False, True])
def test_one_that_cannot_be_written_is_a_warning_and_the_former_stays(run, made, console, monkeypatch, of_state):
    checkpoints = made()
    checkpoints.save(state(1), final=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    module = f"blip2x.engine.{'training_state' if of_state else 'checkpoint'}"
    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.write_safetensors", full)
        checkpoints.save(state(2), final=False)
        with pytest.raises(UserError, match=r"the finished training cannot be saved in .*No space left on device"):
            checkpoints.save(state(3), final=True)
        patched.setattr("blip2x.engine.folders.MIN_FREE_BYTES", 0)
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
        checkpoints.save(state(3), final=False)
        with pytest.raises(UserError, match="MiB free on its disk"):
            checkpoints.save(state(4), final=True)
    assert kept(run) == [1]
    said = console.file.getvalue()
    assert said.count("could not be saved, the training goes on and the former one is kept") == 2 and "No space left" in said
    checkpoints.save(state(5), final=False)  # there is room again
    assert kept(run) == [5]


def test_a_validation_that_cannot_be_written_down_is_a_warning(run, made, console, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2x.engine.run.write_whole", full)
    made().validated(3, {"accuracy": 0.5})
    assert "the validation of step 3 could not be written down" in console.file.getvalue()


def test_an_error_of_ours_is_no_warning(made):
    def broken(folder, state, *, copy):
        return lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        made(broken).save(state(1), final=False)


def test_in_the_background_the_model_as_it_was_is_written_while_it_changes(run, made, model):
    may_write, before = threading.Event(), model.weight.numpy().copy()
    checkpoints = made(save_in_background=True)
    write_later = checkpoints._prepare

    def prepare(folder, state, *, copy):
        write = write_later(folder, state, copy=copy)
        return lambda: (may_write.wait(10), write())

    checkpoints._prepare = prepare
    checkpoints.save(state(1), final=False)  # returns, though nothing is written yet
    assert kept(run) == []
    model.weight.set_value(model.weight + 1)
    may_write.set()
    checkpoints.wait()
    tensors = open_tensors(run.folder / "checkpoints/step-00000001/model.safetensors")
    assert (tensors["weight"].read() == before).all()


def test_a_failure_in_the_background_is_told_with_the_next_one(run, made, console):
    def prepare(folder, state, *, copy):
        def write():
            raise OSError("disk is gone")

        return write

    checkpoints = made(prepare, save_in_background=True)
    checkpoints.save(state(1), final=False)
    checkpoints.wait()
    assert "disk is gone" in console.file.getvalue() and kept(run) == []


def test_the_newest_whole_one_is_found_and_broken_ones_are_named(run, made):
    checkpoints = made(keep_last=9)
    assert newest_checkpoint(run.folder, print) is None
    for step in (9, 10, 100_000_000):  # by number, not by letters
        checkpoints.save(state(step), final=False)
    places = {step: run.folder / f"checkpoints/step-{step:08d}" for step in (9, 10, 100_000_000)}
    assert newest_checkpoint(run.folder, print) == places[100_000_000]
    weights = places[100_000_000] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (places[10] / "training/state.json").unlink()
    said = []
    assert newest_checkpoint(run.folder, said.append) == places[9]
    assert len(said) == 2 and str(places[100_000_000]) in said[0] and "state.json is missing" in said[1]
    assert newest_checkpoint(places[9], said.append) == places[9]


def test_a_state_comes_back_and_what_is_none_is_said(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    state(7).write(folder)
    found = TrainingState.read(folder)
    assert found.optimizer["w.moment1"].tolist() == [1, 1]
    assert {**vars(found), "optimizer": None} == {**vars(state(7)), "optimizer": None}
    (folder / "training/state.json").write_text('{"step": 7}')
    with pytest.raises(UserError, match=r"training is damaged .*; go on from another checkpoint"):
        TrainingState.read(folder)
    with pytest.raises(UserError, match="has weights only"):
        TrainingState.read(tmp_path)
