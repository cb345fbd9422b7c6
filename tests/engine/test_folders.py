"""Run folders: one process gets one, and overwrite=true replaces runs only."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from blip2x.engine.folders import RUN_FILES, claim_folder, hold, is_held, release, require_space
from blip2x.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# waits until all are there, prints what it got, and keeps it until it is told to end
RACER = """
import sys, time
from pathlib import Path
from blip2x.engine.folders import claim_folder, hold
from blip2x.errors import UserError
parent, name = Path(sys.argv[1]), sys.argv[2] or None
print("ready", flush=True)
time.sleep(max(0, float(sys.stdin.readline()) - time.time()))
try:
    folder = claim_folder(parent, name, auto_name="auto", overwrite=sys.argv[3] == "overwrite")
    (folder / "mine").open("x").close()
    print(folder.name, flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.read()
"""


def claim(parent, name="a", **changes):
    return claim_folder(parent, name, **{"auto_name": "auto", "overwrite": False, **changes})


def finished_run(folder):
    folder.mkdir(parents=True)
    for name in RUN_FILES:
        (folder / name).write_text("")
    (folder / "checkpoint").mkdir()
    return folder


def test_a_named_folder_is_made_with_its_parents_and_given_once(tmp_path):
    assert claim(tmp_path / "x" / "y") == tmp_path / "x" / "y" / "a"
    with pytest.raises(UserError, match="a exists already; choose another run_name, go on with resume=auto, or replace it"):
        claim(tmp_path / "x" / "y")


def test_automatic_names_are_numbered(tmp_path):
    assert [claim(tmp_path, None).name for _ in range(3)] == ["auto", "auto-2", "auto-3"]


def test_overwrite_replaces_a_run_by_an_empty_folder(tmp_path):
    finished_run(tmp_path / "a")
    assert list(claim(tmp_path, overwrite=True).iterdir()) == []


@pytest.mark.parametrize("present", [[], ["config.yaml"], ["config.yaml", "command.txt"]])
def test_overwrite_keeps_what_is_no_run(tmp_path, present):
    """A folder with a config.yaml alone may well be somebody's source, such as this project's conf."""
    (tmp_path / "a").mkdir()
    for name in [*present, "thesis.tex"]:
        (tmp_path / "a" / name).write_text("mine")
    with pytest.raises(UserError, match="is no run of blip2x and is kept"):
        claim(tmp_path, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*present, "thesis.tex"])


def test_overwrite_keeps_a_link_and_what_it_points_to(tmp_path):
    run = finished_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "a").symlink_to(run)
    with pytest.raises(UserError, match=r"cannot make a run folder in .*symbolic link"):
        claim(tmp_path, overwrite=True)
    assert (run / "checkpoint").is_dir()


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="no run of blip2x"):
        claim(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"cannot make a run folder in .*set paths\.outputs to a folder that can be written"):
        claim(tmp_path / "a")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/a", "../a"])
def test_names_stay_inside_the_parent(tmp_path, name):
    with pytest.raises(UserError, match="must be a plain folder name"):
        claim(tmp_path, name, overwrite=True)


def test_space_is_that_of_the_disk_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or namedtuple("Usage", "free")(3 * 2**20))
    require_space(tmp_path / "not" / "there", 3 * 2**20)
    with pytest.raises(UserError, match=r"3 MiB free on its disk, 4 MiB are needed; .*paths\.outputs"):
        require_space(tmp_path / "not" / "there", 4 * 2**20)
    assert asked == [tmp_path, tmp_path]


@pytest.fixture
def others():
    """`others(*arguments, count)` -> processes that claim a folder at the same moment, and the line that each of them says."""
    started = []

    def call(*arguments, count):
        words = [sys.executable, "-c", RACER, *arguments]
        own = [
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(count)
        ]
        started.extend(own)
        assert all(process.stdout.readline() == "ready\n" for process in own)
        for process in own:
            process.stdin.write(f"{time.time() + 0.2}\n")
            process.stdin.flush()
        return own, [process.stdout.readline().strip() for process in own]

    yield call
    for process in started:
        process.communicate()


def test_eight_processes_get_eight_folders(tmp_path, others):
    _, names = others(str(tmp_path), "", "", count=8)
    assert sorted(names) == ["auto", *(f"auto-{number}" for number in range(2, 9))]


def test_one_of_several_processes_gets_a_name_and_nobody_replaces_it_meanwhile(tmp_path, others):
    _, said = others(str(tmp_path), "a", "", count=4)
    assert said.count("a") == 1
    assert all("exists already" in line or "is working on this run" in line for line in said if line != "a")
    for name in RUN_FILES:
        (tmp_path / "a" / name).touch()
    _, said = others(str(tmp_path), "a", "overwrite", count=4)  # while the first one works in it
    assert all("is working on this run; wait for its end" in line for line in said) and (tmp_path / "a/mine").exists()


def test_a_run_is_held_until_it_ends_or_is_killed(tmp_path, others):
    folder = tmp_path / "a"
    assert not is_held(folder)
    (process,), said = others(str(tmp_path), "a", "", count=1)
    assert said == ["a"] and is_held(folder)
    with pytest.raises(UserError, match=rf"a: process {process.pid} on .* is working on this run; wait for its end"):
        hold(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_held(folder) and hold(folder) and not hold(folder) and is_held(folder)
    release(folder)
    release(folder)
    assert not is_held(folder) and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_could_not_be_made_is_not_held(tmp_path):
    (tmp_path / "a").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError):
            claim(tmp_path, overwrite=overwrite)
    assert not is_held(tmp_path / "a") and [path.name for path in tmp_path.iterdir()] == ["a"]
