"""Where metrics and predictions go besides the run folder's own files: one module per kind.

Each has ``build(cfg, *, folder, config, goes_on, say) -> Logger``, called on rank 0 alone:

    cfg: the logger's own config.
    folder: the run's.
    config: of the whole run, resolved; what is sent elsewhere goes through `_secrets.Secrets` first.
    goes_on: the run was interrupted, and the logger is to go on with what it wrote then.
    say: prints a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from blip2x.config.logger import LoggerConfig
from blip2x.registry import LOGGERS

METRICS_FILE = "metrics.jsonl"  # in the run's folder; has a line before a logger gets it

Row = Mapping[str, Any]


def metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a metrics.jsonl has, in its order; without lines of which a run that was killed, or is writing, has only half."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "step"} <= row.keys():
            yield row


class Logger(Protocol):
    """One place that metrics go to. Whatever a method raises ends this logger, with a warning, and not the run."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take a line of metrics.jsonl."""

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row], folder: Path) -> None:
        """Take rows of predictions under a name.

        Their "image" and "attention" are pictures, or paths of some below `folder`, or None.
        """

    def finish(self, results: Mapping[str, Any]) -> None:
        """Take the content of results.json."""

    def close(self, failed: bool) -> None:
        """Send or write what is left; nothing comes after it. Called after an error of another method, too."""


class Loggers:
    """All loggers of a run. One that fails is left out from then on; neither the run nor the others notice.

    Args:
        loggers: by name.
        say: prints a line.
    """

    def __init__(self, loggers: Mapping[str, Logger] | None = None, say: Callable[[str], None] = print):
        self._loggers = dict(loggers or {})
        self._say = say

    @classmethod
    def build(
        cls,
        configs: Mapping[str, LoggerConfig],
        *,
        folder: Path,
        config: dict[str, Any],
        goes_on: bool,
        say: Callable[[str], None],
    ) -> Loggers:
        """Start those of `configs`; what keeps one from starting is a warning."""
        started = {}
        for name, cfg in configs.items():
            try:
                started[name] = LOGGERS.get(cfg.kind)(cfg, folder=folder, config=config, goes_on=goes_on, say=say)
            except Exception as error:  # a library's errors have no common base, and a chart is not worth a training
                say(f"warning: logger={name} did not start ({reason(error)}); the run goes on without it")
        return cls(started, say)

    def __len__(self) -> int:
        return len(self._loggers)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Give a line of metrics.jsonl to all."""
        self._each(lambda logger: logger.log(stage, step, metrics))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row], folder: Path) -> None:
        """Give rows of predictions to all; see `Logger.table`."""
        self._each(lambda logger: logger.table(stage, step, name, rows, folder))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Give the content of results.json to all."""
        self._each(lambda logger: logger.finish(results))

    def close(self, failed: bool) -> None:
        """Close all; a second call does nothing."""
        self._each(lambda logger: logger.close(failed), is_last=True)
        self._loggers.clear()

    def _each(self, action: Callable[[Logger], None], *, is_last: bool = False) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                action(logger)
            except Exception as error:  # see `build`
                del self._loggers[name]
                self._say(
                    f"warning: logger={name} stopped ({reason(error)}); the run goes on without it, its numbers are in "
                    f"{METRICS_FILE}"
                )
                if not is_last:
                    with suppress(Exception):  # what is wrong with it was said
                        logger.close(True)  # else the next run in this process might log into what it has left open


def reason(error: Exception) -> str:
    """An error in part of a line; services answer with whole pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
