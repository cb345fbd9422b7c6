"""Run folders: one process gets one, and overwrite=true replaces runs only."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from blip2x.engine.folders import RUN_FILES, claim_folder, require_space
from blip2x.errors import UserError


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
