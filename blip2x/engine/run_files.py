"""A run folder, read for its report; whatever is absent is empty here."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from yaml import YAMLError

from blip2x.engine.reading import read_json, read_lines
from blip2x.errors import UserError
from blip2x.pages import data_uri

SCHEDULE_FILE = "schedule.json"  # in a training stage's folder: its name, and the shape of its learning rate
# what a training's lines in metrics.jsonl say of time and memory, and no two runs have alike
TIMES = (
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "images_per_second_per_worker",
    "data_wait",
    "data_wait_seconds",
    "memory_gb",
)
SMALL = 128  # pixels: below, a picture is a drawing whose pixels should stay sharp when it is enlarged
_EMBED_PIXELS = 480  # longer side of what is embedded: about 240 px shown, on a screen of double density
_EMBED_BYTES = 40_000  # larger files are embedded as JPEG


@dataclass(frozen=True)
class Picture:
    """A picture as the page shows it."""

    uri: str  # data:
    small: bool


@dataclass
class RunFiles:
    """The content of a run folder's files."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    command: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)  # "state", "error", "started", "ended"
    diff: str = ""  # of the code to its commit
    results: dict[str, Any] = field(default_factory=dict)
    finished: str = ""  # when results.json was written, UTC
    ended: str = ""  # when a run that failed or was interrupted ended, UTC
    metrics: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    schedules: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage that trained: arguments of `learning_rate`
    notes: list[str] = field(default_factory=list)  # what could not be read: the report says so

    def picture(self, row: dict[str, Any], key: str = "image") -> Picture | None:
        """What `key` of a prediction names, small; None where there is none, or no image, or one outside of the run."""
        if not row.get(key):
            return None
        path = (Path(row["_folder"]) / str(row[key])).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return None
        try:
            return _embed(path)
        except Exception:  # decoders meet garbage with all sorts of exceptions; a report shows what can be shown
            return None


def read_run(folder: Path) -> RunFiles:
    """Read what a run writes about itself, and its predictions and schedules (the run's own and its stages').

    A run that failed or goes on still has some of it.

    Raises:
        UserError: `folder` is no run folder.
    """
    if not any((folder / name).is_file() for name in ("config.yaml", "results.json")):
        raise UserError(f"{folder} is no run folder: it has neither config.yaml nor results.json")
    run = RunFiles(folder)
    run.config_text = _text(folder / "config.yaml")
    try:
        run.config = _mapping(OmegaConf.to_container(OmegaConf.create(run.config_text), resolve=False))
    except (YAMLError, OmegaConfBaseException):
        run.notes.append("config.yaml could not be parsed; it is shown as it is")
    run.command = _text(folder / "command.txt").strip()
    run.versions = read_json(folder / "versions.json", run.notes)
    run.hardware = _mapping(run.versions.pop("hardware", None)) or read_json(folder / "hardware.json", run.notes)
    run.status = read_json(folder / "status.json", run.notes)
    with suppress(ValueError):  # none yet, or no time
        run.ended = _moment(datetime.fromisoformat(str(run.status.get("ended")).replace("Z", "+00:00")))
    run.diff = _text(folder / "diff.patch").strip()
    run.results = read_json(folder / "results.json", run.notes)
    if run.results:
        run.finished = _moment(datetime.fromtimestamp((folder / "results.json").stat().st_mtime, timezone.utc))
    run.metrics = list(read_lines(folder / "metrics.jsonl", run.notes))
    for path in (folder / "predictions.jsonl", *sorted(folder.glob("*/predictions.jsonl"))):
        rows, parent = list(read_lines(path, run.notes, str(path.relative_to(folder)))), path.parent
        for row in rows:
            row["_folder"] = parent  # one object for all of them
        run.predictions += rows
    for path in (folder / SCHEDULE_FILE, *sorted(folder.glob(f"*/{SCHEDULE_FILE}"))):
        shape = read_json(path, run.notes, str(path.relative_to(folder)))
        if "stage" in shape:
            run.schedules[str(shape.pop("stage"))] = shape
    stages = list(run.results)
    run.predictions.sort(key=lambda row: stages.index(row.get("stage")) if row.get("stage") in stages else len(stages))
    return run


def _moment(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _embed(path: Path) -> Picture:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        mime = Image.MIME.get(image.format or "", "image/png")
        small = max(image.size) < SMALL
        if not small and len(data) > _EMBED_BYTES:
            image.thumbnail((_EMBED_PIXELS, _EMBED_PIXELS))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
            data, mime = buffer.getvalue(), "image/jpeg"
    return Picture(data_uri(data, mime), small)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
