"""TensorBoard's event files in ``<run folder>/tensorboard``, written without TensorFlow or torch.

Each stage has a folder of its own there, for it counts its own steps; the run's config and results are in the folder itself.
What tensorboardX offers as a whole, `SummaryWriter`, hands everything to a thread, whose end (a full disk) would block the run.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from blip2x.config.logger import TensorboardConfig
from blip2x.engine.loggers import METRICS_FILE, Row, metric_lines
from blip2x.engine.loggers._names import flat
from blip2x.engine.loggers._secrets import Secrets
from blip2x.engine.loggers._table import Table, make_table
from blip2x.engine.versions import versions
from blip2x.registry import LOGGERS

FOLDER = "tensorboard"


class EventFile:
    """One event file in `folder`; what has come is on the disk after each `flush`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        # a name that no earlier process has used: runs may go on within the second that is in it
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")

    def add(self, step: int, **what: Any) -> None:
        """Add an event."""
        self._file.write_event(Event(step=step, wall_time=time.time(), **what))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers by tag."""
        for tag, value in values.items():
            self.add(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """Add a picture."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=buffer.getvalue()
        )
        self.add(step, summary=Summary(value=[Summary.Value(tag=tag, image=encoded)]))

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a text in Markdown."""
        self.add(step, summary=summary.text(tag, text))

    def flush(self) -> None:
        """Have it on the disk."""
        self._file.flush()

    def close(self) -> None:
        """Have it on the disk, and no more come."""
        self._file.close()


class TensorboardLogger:
    """Event files of a run.

    Args:
        folder: the run's.
        rows: at most so many of a table.
        config: of the run, without secrets.
        hide: takes secrets out of texts.
        goes_on: the run was interrupted; what it logged behind its checkpoint is hidden.
    """

    def __init__(self, folder: Path, rows: int, config: dict[str, Any], hide: Secrets, *, goes_on: bool):
        self._folder, self._rows, self._config, self._secrets, self._goes_on = folder, rows, config, hide, goes_on
        self._stages: dict[str, EventFile] = {}
        self._run = EventFile(folder / FOLDER)
        if goes_on:
            self._forget(self._run, 0)
        self._run.text(0, "config", "".join(f"    {line}\n" for line in _yaml(config).splitlines()))
        self._run.flush()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add numbers as ``<stage>/<name>``."""
        is_there = stage in self._stages or not self._goes_on
        file = self._stage(stage, step)
        if is_there:  # else the line has come with those of metrics.jsonl
            file.scalars(step, _tags(stage, metrics))
        file.flush()

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row], folder: Path) -> None:
        """Add the texts as a table, and each picture under the row's number."""
        if not self._rows:
            return
        table, file = make_table(rows, folder, self._rows, self._secrets.text), self._stage(stage, step)
        file.text(step, f"{stage}/{name}", _markdown(table))
        for number, row in enumerate(table.rows):
            for column, cell in zip(table.columns, row, strict=True):
                if isinstance(cell, Image.Image):
                    file.picture(step, f"{stage}/{name}/{number:03d} {column}", cell)
        file.flush()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add the results, and what TensorBoard compares runs by (HPARAMS)."""
        numbers = {tag: value for tag, value in flat(results, "results/").items() if isinstance(value, (int, float))}
        plain = {key: value for key, value in flat(self._config).items() if isinstance(value, (bool, int, float, str))}
        for part in summary.hparams(plain, numbers):
            self._run.add(0, summary=part)
        self._run.scalars(0, numbers)
        self._run.flush()

    def close(self, failed: bool) -> None:
        """Close the files."""
        for file in (self._run, *self._stages.values()):
            file.close()

    def _stage(self, stage: str, step: int) -> EventFile:
        """The file of a stage, which begins at `step`."""
        if stage not in self._stages:
            file = self._stages[stage] = EventFile(self._folder / FOLDER / stage)
            if self._goes_on:
                self._forget(file, step)
                for line in self._lines(stage, step):  # those that stay, of the same step
                    file.scalars(line.pop("step"), _tags(stage, line))
        return self._stages[stage]

    @staticmethod
    def _forget(file: EventFile, step: int) -> None:
        """Hide what earlier files of the folder have of this and later steps."""
        file.add(step, session_log=SessionLog(status=SessionLog.START))

    def _lines(self, stage: str, step: int) -> Iterator[dict[str, Any]]:
        for row in metric_lines(self._folder / METRICS_FILE):
            if row.pop("stage") == stage and row["step"] >= step:
                yield row


@LOGGERS.register("tensorboard")
def build(
    cfg: TensorboardConfig, *, folder: Path, config: dict[str, Any], goes_on: bool, say: Callable[[str], None]
) -> TensorboardLogger:
    """Start event files below `folder`, beside those that are there."""
    hide = Secrets()
    return TensorboardLogger(folder, cfg.rows, hide.clean({**config, "versions": versions()}), hide, goes_on=goes_on)


def _tags(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _markdown(table: Table) -> str:
    columns = [place for place, name in enumerate(table.columns) if not _has_picture(table, place)]
    lines = [["row", *(table.columns[place] for place in columns)], ["---"] * (len(columns) + 1)]
    lines += [[f"{number:03d}", *(_cell(row[place]) for place in columns)] for number, row in enumerate(table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has_picture(table: Table, place: int) -> bool:
    return any(isinstance(row[place], Image.Image) for row in table.rows)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
