"""A training that is asked to stop and gone on with equals one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from blip2x.config.compose import compose_config
from blip2x.engine import fit
from blip2x.engine.run_files import TIMES
from blip2x.errors import Interrupted, UserError
from blip2x.models.weights.manifest import read_manifest
from blip2x.tasks.common.launch import launch

# 9 micro-batches an epoch: it ends in the middle of step 5
STEPS = ["task.batch_size=7", "task.accumulate=2", "task.max_steps=7", "task.max_epochs=null", "task.log_every=3"]
DATA = ["dataset.train_scenes=64", "dataset.test_scenes=8", "optim.warmup_steps=3", "task.eval_batch_size=5"]


def words(task: str, demo) -> list[str]:
    """The task with random numbers wherever it can have some."""
    run = demo("model=tiny_opt")
    vision = f"model.vision.weights={run.checkpoint('pretrain_vision')}"
    return {
        "pretrain_vision": ["model.vision.drop_path_rate=0.5"],
        "pretrain_language": ["model.language.dropout=0.1"],
        "pretrain_stage1": ["model.qformer.dropout=0.1", "task.contrast_steps=2", vision],
        "pretrain_stage2": [
            "model.qformer.dropout=0.1",
            f"model.weights={run.checkpoint('pretrain_stage1')}",
            f"model.language.weights={run.checkpoint('pretrain_language')}",
        ],
        "caption": [
            "model.qformer.dropout=0.1",
            f"model.weights={run.checkpoint('pretrain_stage2')}",
            *(
                "task.train=true",
                "task.max_txt_len=20",
                "task.metrics=[CIDEr]",
                "task.blind_baseline=false",
                "task.num_beams=1",
            ),
        ],
        "vqa_finetune": [
            "model.qformer.dropout=0.1",
            f"model.weights={run.checkpoint('pretrain_stage2')}",
            f"model.qformer.weights={run.checkpoint('pretrain_stage1')}",
            "task.validation.max_images=2",
        ],
    }[task]


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(2, 5)`: this process gets SIGTERM in the middle of these optimizer steps, in each once."""
    steps, read = [], fit.LossRecord.add

    def add(record, step, parts):
        if step in steps:
            steps.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        read(record, step, parts)

    monkeypatch.setattr(fit.LossRecord, "add", add)
    return lambda *wanted: steps.extend(wanted)


def run(command: list[str], outputs: Path, name: str) -> Path:
    launch(compose_config([*command, f"paths.outputs={outputs}", f"run_name={name}"]), ["x"])
    return outputs / name


def until_it_ends(command: list[str], outputs: Path, name: str) -> tuple[Path, int]:
    """The run folder, and how often it was interrupted."""
    for stops in range(5):
        try:
            return run([*command, "resume=auto"], outputs, name), stops
        except Interrupted:
            continue
    raise AssertionError("interrupted again and again")


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same(found: Path, wanted: Path, stage: str = ".") -> None:
    assert lines(found) == lines(wanted)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        arrays, expected = (load_file(folder / stage / "checkpoint" / name) for folder in (found, wanted))
        assert arrays.keys() == expected.keys()
        assert all(array.tobytes() == expected[key].tobytes() for key, array in arrays.items()), name


@pytest.mark.parametrize(
    "task", ["pretrain_vision", "pretrain_language", "pretrain_stage1", "pretrain_stage2", "caption", "vqa_finetune"]
)
def test_every_task_goes_on_as_if_it_had_never_stopped(demo, tmp_path, stop_at, task):
    """With dropout, random negatives, crops and captions; stopped before and after an epoch that ends within a step."""
    command = [f"task={task}", *STEPS, *DATA, *words(task, demo), "task.save_every=4"]
    alone = run(command, tmp_path, "alone")
    stop_at(2, 5)
    found, stops = until_it_ends(command, tmp_path, "stopped")
    assert stops == 2
    assert_same(found, alone)
    results = [json.loads((folder / "results.json").read_text())[task] for folder in (found, alone)]
    assert results[0] == results[1]


def test_validation_on_the_way_and_writing_in_the_background_change_nothing(demo, tmp_path, stop_at):
    command = ["task=pretrain_stage1", *STEPS, *DATA, *words("pretrain_stage1", demo)]
    alone = run(command, tmp_path, "alone")
    stop_at(3, 4)
    often = ["task.eval_every=2", "task.save_every=1", "task.save_in_background=true", "dataset.num_workers=1"]
    found, _ = until_it_ends([*command, *often], tmp_path, "often")
    arrays, expected = (load_file(folder / "checkpoint/model.safetensors") for folder in (found, alone))
    assert all(array.tobytes() == expected[key].tobytes() for key, array in arrays.items())
    assert [row["step"] for row in lines(found) if "chance" in row] == [2, 4, 6, 7]


def test_a_pipeline_does_not_repeat_what_is_done(demo, tmp_path, stop_at):
    before = demo("model=tiny_opt")
    command = [word for word in before.command if not word.startswith(("run_name", "paths.outputs"))]
    stop_at(4)  # of the first stage; then of the second
    found, stops = until_it_ends([*command, "model=tiny_opt"], tmp_path, "r")
    assert stops == 1
    stages = {name: value for name, value in before.results.items() if isinstance(value, dict)}
    results = json.loads((found / "results.json").read_text())
    assert {name: results[name] for name in stages} == stages
    assert lines(found) == lines(before.folder)


@pytest.fixture
def vision(tmp_path):
    """A short run with checkpoints at 2, 4 and 6, the last two kept, and the command."""
    command = ["task=pretrain_vision", *STEPS, *DATA, "task.save_every=2", "task.keep_last=3"]
    return run(command, tmp_path, "r"), command


def test_damaged_checkpoints_are_passed_over_and_named(vision, tmp_path, capfd):
    folder, command = vision
    (folder / "results.json").unlink()
    assert sorted(path.name for path in (folder / "checkpoints").glob("step*")) == ["step-00000004", "step-00000006"]
    expected = load_file(folder / "checkpoint/model.safetensors")
    file = folder / "checkpoint/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit
    file.write_bytes(content)
    (folder / "checkpoints/step-00000006/manifest.json").unlink()
    (folder / "checkpoints/.step-00000008.partial").mkdir()
    run([*command, "resume=auto"], tmp_path, "r")
    said = capfd.readouterr().out.replace("\n", "")
    assert "passed over" in said and "checkpoint/model.safetensors is damaged" in said and "it has no manifest.json" in said
    assert "step-00000004:step4" in "".join(said.split())  # a long path may break the line anywhere
    arrays = load_file(folder / "checkpoint/model.safetensors")
    assert all(array.tobytes() == expected[key].tobytes() for key, array in arrays.items())


def test_a_finished_run_is_left_as_it_is(vision, tmp_path):
    folder, command = vision
    written = ("command.txt", "log.txt", "report.html")  # a line more, and anew
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name not in written}
    results = launch(compose_config([*command, "resume=auto", "run_name=r", f"paths.outputs={tmp_path}"]), ["x"])
    assert results == json.loads((folder / "results.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_killed_behind_its_last_step_only_finishes(vision, tmp_path):
    folder, command = vision
    wanted = {name: (folder / name).read_bytes() for name in ("checkpoint/model.safetensors", "metrics.jsonl")}
    results = json.loads((folder / "results.json").read_text())["pretrain_vision"]
    (folder / "results.json").unlink()
    run([*command, "resume=auto"], tmp_path, "r")
    assert {name: (folder / name).read_bytes() for name in wanted} == wanted
    assert json.loads((folder / "results.json").read_text())["pretrain_vision"] == results


def test_resume_with_other_settings_is_refused_and_names_them(vision, tmp_path):
    _, command = vision
    with pytest.raises(UserError, match=r"other settings: optim.lr was 0.002, is 0.1; task.max_steps was 7, is 9\. Go on"):
        run([*command, "resume=auto", "optim.lr=0.1", "task.max_steps=9"], tmp_path, "r")


def test_another_run_may_start_from_a_state_with_other_settings(vision, tmp_path, capfd):
    folder, command = vision
    for place, first in ((folder, 8), (folder / "checkpoints/step-00000006", 7)):
        other = run([*command, f"resume={place}", "task.max_steps=9", "optim.lr=1e-3"], tmp_path, f"from-{place.name}")
        assert "going on" in capfd.readouterr().out
        assert [row["step"] for row in lines(other) if "loss" in row] == sorted({first + first % 2, 8, 9})
        assert read_manifest(other / "checkpoint")["step"] == 9


def test_what_cannot_be_gone_on_with_is_one_sentence(vision, tmp_path):
    folder, command = vision
    shutil.rmtree(folder / "checkpoint/training")
    for resume, sentence in {
        str(folder / "checkpoint"): "no whole checkpoint",
        str(tmp_path): "no whole checkpoint",
        str(tmp_path / "nowhere"): "is no folder",
    }.items():
        with pytest.raises(UserError, match=sentence):
            run([*command, f"resume={resume}"], tmp_path, "other")
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
    with pytest.raises(UserError, match="give run_name"):
        compose_config([*command, "resume=auto"])


def test_a_run_that_began_from_another_begins_there_again(vision, tmp_path, capfd, monkeypatch):
    """It was killed before it had a checkpoint of its own."""
    folder, command = vision
    longer = [*command, "task.max_steps=9", "task.save_every=null"]
    expected = run([*longer, f"resume={folder}"], tmp_path, "alone")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("blip2x.engine.fit.Training.fit", lambda training: (_ for _ in ()).throw(KeyboardInterrupt))
        run([*longer, f"resume={folder}"], tmp_path, "killed")
    found = run([*longer, "resume=auto"], tmp_path, "killed")
    assert_same(found, expected)
    assert json.loads((found / "results.json").read_text())["starts"] == 2
    assert " seconds of start 2" in capfd.readouterr().out


def test_a_report_that_was_not_written_any_more_is_written(vision, tmp_path, capfd):
    folder, command = vision
    (folder / "report.html").unlink()
    run([*command, "resume=auto"], tmp_path, "r")
    assert (folder / "report.html").is_file() and "this run is complete" in capfd.readouterr().out
