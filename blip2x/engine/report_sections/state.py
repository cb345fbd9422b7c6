"""How a run ended, where it did not come to its end, and what it ran on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blip2x.engine.comparisons import stage_title
from blip2x.engine.report_sections.rows import Row
from blip2x.engine.run_files import RunFiles

_TOLD = {"failed": "failed", "interrupted": "interrupted", "running": "not finished"}


@dataclass(frozen=True)
class Unfinished:
    """What is said first about a run that did not come to its end."""

    state: str
    error: str
    reached: str  # the last line of its log


def unfinished(run: RunFiles) -> Unfinished | None:
    """None for a run that is complete."""
    state = _TOLD.get(str(run.status.get("state")), "")
    complete = "seconds" in run.results  # written when all else is done
    if complete and state != _TOLD["failed"]:
        return None
    if not state and run.results:  # of before there was a status
        return None
    error = str(run.status.get("error") or "")
    if not error and state in ("", _TOLD["running"]):
        error = "When this page was made, it was still going on, or something had killed it."
    return Unfinished(state or _TOLD["running"], error, _reached(run.metrics, run.schedules))


def machine(hardware: dict[str, Any]) -> dict[str, str]:
    """`hardware` in words."""
    return {str(key).replace("_", " "): _words(value) for key, value in hardware.items() if value not in (None, "", [], {})}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}".replace("_", " ") for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _reached(metrics: list[Row], schedules: dict[str, Row]) -> str:
    lines = [row for row in metrics if isinstance(row.get("step"), int)]
    if not lines:
        return "It logged no step."
    stage, step = str(lines[-1].get("stage", "run")), lines[-1]["step"]
    total = schedules.get(stage, {}).get("total_steps")
    return f"Its log ends in {stage_title(stage)}, step {step:,}{f' of {total:,}' if isinstance(total, int) else ''}."
