"""The run folder: what stands in it before the work starts, who writes, and that what is written is whole."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import namedtuple
from contextlib import suppress

import pytest
from omegaconf import OmegaConf

from blip2x.config.compose import compose_config
from blip2x.engine.folders import is_held
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.engine.status import read_status
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.context import Context


class SecondRank(Context):
    """Rank 1 of two; rank 0 says that it made `folder`."""

    folder = None

    def broadcast_object(self, value):
        return (self.folder, False), None


class Recorder:
    """A logger that keeps everything."""

    def __init__(self):
        self.lines, self.tables, self.results, self.closed = [], [], [], []

    def log(self, *line):
        self.lines.append(line)

    def table(self, *table):
        self.tables.append(table)

    def finish(self, results):
        self.results.append(results)

    def close(self, failed):
        self.closed.append(failed)


def config(tmp_path, *overrides):
    return compose_config([f"paths.outputs={tmp_path}/outputs", *overrides])


def create(tmp_path, console, *overrides, context=None, command=("runners/run.py",)):
    return Run.create(config(tmp_path, *overrides), context or Context(), list(command), console)


def test_folder_has_all_that_repeats_the_run(tmp_path, console):
    command = ["runners/run.py", "run_name=a b", "optim.lr=1e-3"]
    run = create(tmp_path, console, "run_name='a b'", "optim.lr=1e-3", command=command)
    assert run.stage == "pipeline" and run.folder == run.root == tmp_path / "outputs" / "a b"
    written = OmegaConf.load(run.folder / "config.yaml")
    assert written.optim.lr == 1e-3 and written.task.kind == "pipeline" and written.device == "auto"
    assert "${" not in (run.folder / "config.yaml").read_text()
    assert shlex.split((run.folder / "command.txt").read_text()) == command
    assert json.loads((run.folder / "versions.json").read_text())["paddlenlp"]
    assert OmegaConf.load(run.folder / "overrides.yaml") == command[1:]
    hardware = json.loads((run.folder / "hardware.json").read_text())
    assert hardware["cpu"] and hardware["memory_gb"] > 0 and hardware["usable_cores"] > 0
    assert (hardware["gpus"], hardware["device"], hardware["ranks"]) == ([], "cpu", 1)


def test_automatic_name_says_task_model_data_and_time(tmp_path, console):
    name = create(tmp_path, console).folder.name
    assert re.fullmatch(r"pipeline-tiny_opt-digits-\d{8}-\d{6}", name)


def test_a_repeat_is_called_by_what_it_repeats(tmp_path, console):
    folder = create(tmp_path, console, "run_name=a").folder
    names = [create(tmp_path, console, f"run={folder}").folder.name for _ in range(2)]
    names.append(create(tmp_path, console, f"run={folder.parent}/a-repeat-2").folder.name)
    assert names == ["a-repeat", "a-repeat-2", "a-repeat-3"]
    assert create(tmp_path, console, f"run={folder}", "run_name=b").folder.name == "b"


def test_existing_run_is_kept_unless_overwrite_is_set(tmp_path, console):
    folder = create(tmp_path, console, "run_name=a").folder
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match="a exists already"):
        create(tmp_path, console, "run_name=a")
    assert (folder / "results.json").is_file()
    create(tmp_path, console, "run_name=a", "overwrite=true")
    assert not (folder / "results.json").exists() and (folder / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("run={}", "run"),
        ("task=pretrain_vision resume={}", "resume"),
        ("model.weights={}/checkpoint", "model.weights"),
        ("task=compare runs=[elsewhere,{}/]", "runs.1"),
    ],
)
def test_overwrite_keeps_what_the_run_needs(tmp_path, console, words, key):
    folder = create(tmp_path, console, "run_name=a").folder
    (folder / "checkpoint").mkdir()
    with pytest.raises(UserError, match=rf"overwrite=true would delete {folder}.*, which this run needs \({key}\)"):
        create(tmp_path, console, *words.format(folder).split(), "run_name=a", "overwrite=true")
    assert (folder / "checkpoint").is_dir()
    create(tmp_path, console, *words.format(folder).split(), "run_name=b", "overwrite=true")


def test_overwrite_takes_a_name_for_no_path(tmp_path, console, monkeypatch):
    folder = create(tmp_path, console, "run_name=pipeline").folder
    monkeypatch.chdir(folder.parent)
    assert create(tmp_path, console, "run_name=pipeline", "overwrite=true").folder == folder


def test_full_disk_is_one_sentence_and_makes_no_folder(tmp_path, console, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(0))
    with pytest.raises(UserError, match="0 MiB free"):
        create(tmp_path, console, "run_name=a")
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_know_the_folder_and_write_nothing(tmp_path, console):
    context = SecondRank(rank=1, world_size=2)
    object.__setattr__(context, "folder", tmp_path / "made by rank 0")
    run = create(tmp_path, console, "logger=[wandb_offline,tensorboard]", context=context)
    run.log_metrics("s", 1, {"loss": 1.0})
    run.write_json({}, "deep", "results.json")
    run.write_predictions([{"caption": "a"}])
    run.show_examples(pytest.fail)
    run.child("stage").path("checkpoint")
    run.console.print("not shown")
    run.close()
    assert run.folder == tmp_path / "made by rank 0"
    assert list(tmp_path.iterdir()) == [] and console.file.getvalue() == ""


def test_stages_have_folders_of_their_own_and_share_metrics_and_logger(tmp_path, console):
    logger = Recorder()
    run = Run(tmp_path, tmp_path, "pipeline", Context(), console, Loggers({"recorder": logger}))
    first, second = run.child("a"), run.child("b")
    assert (run.stage, first.stage, second.stage) == ("pipeline", "a", "b")
    first.log_metrics("a", 1, {"loss": 2.0})
    second.log_metrics("b", 1, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"stage": "a", "step": 1, "loss": 2.0}, {"stage": "b", "step": 1, "loss": 1.0}]
    assert logger.lines == [("a", 1, {"loss": 2.0}), ("b", 1, {"loss": 1.0})]
    assert second.path("images", "x.png") == tmp_path / "b" / "images" / "x.png"
    assert (tmp_path / "b" / "images").is_dir()
    run.close()
    assert logger.closed == [False]


def recorded(tmp_path, console):
    logger = Recorder()
    return Run(tmp_path, tmp_path, "s", Context(), console, Loggers({"recorder": logger})), logger


@pytest.mark.parametrize("error", [None, ValueError()])
def test_loggers_hear_how_the_run_ended(tmp_path, console, error):
    run, logger = recorded(tmp_path, console)
    with suppress(ValueError), run:
        run.log_results({"s": {"CIDEr": 1.0}})
        if error:
            raise error
    assert logger.closed == [error is not None] and logger.results == [{"s": {"CIDEr": 1.0}}]


def test_predictions_go_to_the_file_and_to_loggers_each_kind_apart_at_the_last_step(tmp_path, console):
    run, logger = recorded(tmp_path, console)
    rows = [{"retrieved_texts": [1]}, {"caption": "a"}, {"retrieved_images": [2]}, {"caption": "b"}]
    run.child("other").log_metrics("other", 9, {"loss": 1.0})
    run.log_metrics("s", 4, {"loss": 1.0})
    lines = run.write_predictions(rows).read_text().splitlines()
    assert run.folder / "predictions.jsonl" == tmp_path / "predictions.jsonl" and [json.loads(line) for line in lines] == rows
    assert logger.tables == [
        ("s", 4, "retrieved_texts", [rows[0]], tmp_path),
        ("s", 4, "predictions", [rows[1], rows[3]], tmp_path),
        ("s", 4, "retrieved_images", [rows[2]], tmp_path),
    ]


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path, console):
    run, logger = recorded(tmp_path, console)
    other = '{"stage": "t", "step": 5}\n'
    (tmp_path / "metrics.jsonl").write_text('{"stage": "s", "step": 4, "loss": 1.0}\n{"stage": "s", "ste\n' + other)
    run.write_predictions([{"caption": "a"}])
    assert [table[1] for table in logger.tables] == [4]
    run.forget_metrics(lambda row: row["step"] < 4)
    assert (tmp_path / "metrics.jsonl").read_text() == other


def test_examples_come_with_the_next_line_of_metrics_and_once(tmp_path, console):
    run, logger = recorded(tmp_path, console)
    run.show_examples(lambda: [{"caption": "a"}])
    assert logger.tables == []
    run.log_metrics("s", 7, {"CIDEr": 1.0})
    run.log_metrics("s", 8, {"loss": 1.0})
    assert logger.tables == [("s", 7, "examples", [{"caption": "a"}], tmp_path)]


def test_examples_are_not_made_where_there_is_no_logger(run):
    run.show_examples(pytest.fail)


def test_ctrl_c_while_loggers_end_leaves_a_complete_run(tmp_path, console):
    run, logger = recorded(tmp_path, console)

    def wait(failed):
        raise Interrupted("SIGINT")

    logger.close = wait
    run.close()
    assert "stopped waiting for the loggers" in console.file.getvalue()
    run, logger = recorded(tmp_path, console)
    logger.close = wait
    with pytest.raises(Interrupted):
        run.close(failed=True)


@pytest.mark.parametrize("error", [Interrupted("SIGINT"), SystemExit(3)])
def test_the_status_is_there_before_loggers_start_and_says_what_ended_them(tmp_path, console, monkeypatch, error):
    during = []

    def build(configs, *, folder, **named):
        during.append(read_status(folder)["state"])
        raise error

    monkeypatch.setattr(Loggers, "build", build)
    with pytest.raises(type(error)):
        create(tmp_path, console, "run_name=a")
    folder = tmp_path / "outputs" / "a"
    ended = {"Interrupted": ("interrupted", "SIGINT"), "SystemExit": ("failed", "SystemExit: 3")}[type(error).__name__]
    status = read_status(folder)
    assert during == ["running"] and (status["state"], status["error"]) == ended and status["ended"]
    assert not is_held(folder) and console._render_hooks == []


def test_starts_are_counted_by_command_and_not_by_line(tmp_path, console):
    command = ["x", "task.prompt=it's\ntwo 'lines'\n"]
    run = create(tmp_path, console, "run_name=a", command=command)
    assert run.starts == 1
    run.close()
    assert create(tmp_path, console, "run_name=a", "resume=auto", command=command).starts == 2


def test_two_stages_of_one_name_are_refused(run):
    run.child("a")
    with pytest.raises(UserError, match="two stages of this run are called 'a'"):
        run.child("a")


def test_json_is_replaced_whole_or_not_at_all(run):
    path = run.write_json({"answer": "zwei, два"}, "results.json")
    assert "два" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        run.write_json({"answer": object()}, "results.json")
    assert json.loads(path.read_text(encoding="utf-8")) == {"answer": "zwei, два"}
    assert [file.name for file in run.folder.iterdir()] == ["results.json"]


def test_rows_are_a_line_each(run):
    rows = [{"text": "one\nline\u2028here"}, {"text": "два"}]
    lines = run.write_lines(rows, "deep", "predictions.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == rows
    assert run.write_lines([], "empty.jsonl").read_text() == ""


def test_loggers_are_built_from_the_config(tmp_path, console):
    run = create(tmp_path, console, "logger=[wandb_offline,tensorboard]")
    run.close()
    assert list(run.folder.glob("wandb/offline-run-*")) and list(run.folder.glob("tensorboard/events.*"))
