"""With what a run was made: packages, and the commit where the code is under version control."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import paddle
import pytest

import blip2x
from blip2x.engine.versions import git_diff, git_state, versions

NO_GIT = {"git_commit": None, "git_dirty": None}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def package(tmp_path):
    """A package folder inside a repository, committed."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder, "init", "-q", "..")
    git(folder, "add", "__init__.py")
    git(folder, "commit", "-qm", "x")
    return folder


def test_packages_have_their_versions_or_none():
    found = versions()
    assert found["blip2x"] == blip2x.__version__ and found["python"].startswith("3.")
    assert paddle.__version__ in (found["paddlepaddle"], found["paddlepaddle-gpu"])
    assert found["hydra-core"].startswith("1.3")
    assert {"git_commit", "git_dirty"} <= found.keys()


def test_commit_and_whether_tracked_files_were_changed(package):
    commit = git(package, "rev-parse", "HEAD").strip()
    (package / "untracked.txt").write_text("an output")
    assert git_state(package) == {"git_commit": commit, "git_dirty": False}
    (package / "__init__.py").write_text("changed = True")
    assert git_state(package) == {"git_commit": commit, "git_dirty": True}


def test_a_copy_inside_somebody_else_s_repository_has_no_commit(package):
    (package / "site-packages").mkdir()
    (package / "site-packages" / "__init__.py").write_text("")
    assert git_state(package / "site-packages") == NO_GIT


def test_no_repository_and_no_git(package, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(tmp_path / "plain") == NO_GIT
    monkeypatch.setenv("PATH", "")
    assert git_state(package) == NO_GIT


def test_uncommitted_changes_can_be_made_again(package, tmp_path):
    """Whatever this user's git is set to; also of files that are no text."""
    (package / "picture.png").write_bytes(bytes(range(256)))
    git(package, "add", "picture.png")
    git(package, "commit", "-qm", "y")
    commit = git(package, "rev-parse", "HEAD").strip()
    assert git_diff(package) is None
    changed = {"__init__.py": "zwei = 'два'\n".encode(), "picture.png": bytes(range(255, -1, -1))}
    for name, content in changed.items():
        (package / name).write_bytes(content)
    (package / "notes.txt").write_text("password")
    for key, value in {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false"}.items():
        git(package, "config", key, value)
    patch = git_diff(package)
    assert commit in patch.decode() and "Not tracked, and not in here: package/notes.txt" in patch.decode()
    assert b"password" not in patch and b"CUT" not in patch

    git(package, "checkout", "-q", ".")
    (tmp_path / "diff.patch").write_bytes(patch)
    git(package.parent, "apply", str(tmp_path / "diff.patch"))
    assert {name: (package / name).read_bytes() for name in changed} == changed


def test_many_changes_are_cut_and_said_to_be(package):
    (package / "__init__.py").write_text("x = 1\n" * 100_000)
    for number in range(102):
        (package / f"{number:03}.txt").touch()
    patch = git_diff(package, limit=5_000)
    assert len(patch) < 8_000 and b"CUT: these are the first 5000 bytes of more, so it cannot be applied" in patch
    assert b"099.txt and 2 more" in patch and b"100.txt" not in patch


def test_no_changes_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_diff(tmp_path) is None


def test_a_repository_of_another_user_is_looked_at(package, monkeypatch):
    commit = git(package, "rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("changed = True")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own, for its tests
    with pytest.raises(subprocess.CalledProcessError):
        git(package, "status")
    assert git_state(package) == {"git_commit": commit, "git_dirty": True}
    assert b"+changed = True" in git_diff(package)


@pytest.mark.parametrize(("slow", "state"), [("status", None), ("diff", True)])
def test_a_git_that_takes_too_long_costs_what_it_was_asked_for(package, tmp_path, monkeypatch, slow, state):
    commit = git(package, "rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("changed = True")
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *" {slow} "*) exec sleep 20;; esac\nexec {shutil.which("git")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr("blip2x.engine.versions._SECONDS", 0.5)
    assert git_state(package) == {"git_commit": commit, "git_dirty": state}
    assert git_diff(package) is None
