"""With what a run was made."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import blip2x

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "tokenizers", "hydra-core", "omegaconf", "pycocoevalcap")


def versions() -> dict[str, Any]:
    """Versions of blip2x, python and the packages that change results (null: not installed), and the git state."""
    found: dict[str, Any] = {"blip2x": blip2x.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {**found, **git_state(Path(blip2x.__file__).parent)}


def git_state(folder: Path) -> dict[str, Any]:
    """{"git_commit", "git_dirty"} of the repository that holds `folder`; both null outside of one or without git."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # fails where somebody else's repository holds our copy
        commit = _git(folder, "rev-parse", "HEAD")
        return {"git_commit": commit, "git_dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
