"""status.json: how far a run has come, for whoever looks at its folder."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from blip2x.engine.folders import write_whole
from blip2x.engine.reading import read_json
from blip2x.errors import Interrupted, UserError

STATUS_FILE = "status.json"


class State(Enum):
    """How a run has ended; one that is `running`, and in which no process works, was killed."""

    running = "running"
    complete = "complete"
    failed = "failed"
    interrupted = "interrupted"


def begin_status(folder: Path) -> None:
    """Say in the run `folder` that its work has begun: {"state", "error", "started", "ended"}, with times in UTC."""
    write_status(folder, State.running, _now())


def end_status(folder: Path, error: BaseException | None = None) -> None:
    """Say how the work that `begin_status` noted has ended; None: as it should."""
    started = read_status(folder).get("started") or _now()
    if error is None:
        write_status(folder, State.complete, started, _now())
        return
    interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
    is_sentence = isinstance(error, (Interrupted, UserError))
    sentence = str(error) if is_sentence else f"{type(error).__name__}: {error}".removesuffix(": ")
    with suppress(OSError):  # such as a full disk, which may be the error itself
        write_status(folder, State.interrupted if interrupted else State.failed, started, _now(), sentence)


def write_status(folder: Path, state: State, started: str, ended: str | None = None, error: str | None = None) -> None:
    """Replace the status of the run in `folder`; times are UTC in ISO's format."""
    status = {"state": state.value, "error": error, "started": started, "ended": ended}
    write_whole(folder / STATUS_FILE, json.dumps(status, indent=2, ensure_ascii=False) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """The status of the run in `folder`; empty where it has none that can be read."""
    return read_json(folder / STATUS_FILE)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
