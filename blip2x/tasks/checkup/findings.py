"""What a check gives, and how it looks in a terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from blip2x.data.audit.verdicts import Line, Verdict

STYLES = {Verdict.fine: "green", Verdict.look: "yellow", Verdict.broken: "bold red"}
INDENT = 8  # columns: the longest verdict, and two blanks


@dataclass
class Findings:
    """Of one check.

    Attributes:
        where: what was looked at: a task, or the machine.
        lines: the verdicts.
        shown: what the terminal shows above them, line by line.
        record: what doctor.json keeps besides.
        page: Markdown, for memory.md.
    """

    where: str
    lines: list[Line] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    page: str = ""

    def fine(self, check: str, found: str) -> None:
        """A line on what is as it should be."""
        self.lines.append(Line(self.where, check, Verdict.fine, found))

    def look(self, check: str, found: str, advice: str = "") -> None:
        """A line on what somebody should see."""
        self.lines.append(Line(self.where, check, Verdict.look, found, advice))

    def broken(self, check: str, found: str, advice: str = "") -> None:
        """A line on what would stop the task, or make it worthless."""
        self.lines.append(Line(self.where, check, Verdict.broken, found, advice))

    def show(self, console: Console) -> None:
        """Print all of it."""
        for text in self.shown:
            console.print(" " * INDENT + text, style="dim", markup=False, highlight=False, soft_wrap=True)
        width = console.width if console.is_terminal else 10_000  # a file's lines are as long as they are
        for line in self.lines:
            said = f"{line.check}: {line.found}" + (f" -> {line.advice}" if line.advice else "")
            first, *others = textwrap.wrap(said, max(width - INDENT, 20)) or [""]
            console.print(Text.assemble((f"{line.verdict.value:<{INDENT}}", STYLES[line.verdict]), first), soft_wrap=True)
            for rest in others:
                console.print(" " * INDENT + rest, markup=False, highlight=False, soft_wrap=True)


def sentence(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(str(error).split())
