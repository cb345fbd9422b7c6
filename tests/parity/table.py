"""Writes the table at the end of README.md from what the tests measured.

BLIP2X_PARITY_TABLE=measured.jsonl pytest tests/parity
python tests/parity/table.py measured.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

README = Path(__file__).parent / "README.md"
MARK = "<!-- table.py writes everything below -->\n"


def table(lines: list[str]) -> str:
    """A row for each folder and name, with the worst of its comparisons."""
    worst: dict[tuple[str, str, float, float], dict] = {}
    for row in map(json.loads, lines):
        folder = Path(row["test"].split("::")[0]).parent.name
        key = (folder, row["name"], row["atol"], row["rtol"])
        best = worst.setdefault(key, {"difference": 0.0, "largest": 0.0})
        for column in best:
            best[column] = max(best[column], row[column])
    rows = ["| folder | block | largest number | largest difference | tolerance |", "|---|---|---|---|---|"]
    for (folder, name, atol, rtol), row in sorted(worst.items()):
        allowed = " + ".join(([f"{atol:.0e}"] if atol else []) + ([f"{rtol:.0e} of the number"] if rtol else [])) or "none"
        rows.append(f"| {folder} | {name} | {row['largest']:.3g} | {row['difference']:.1e} | {allowed} |")
    return "\n".join(rows) + "\n"


def main(measured: str) -> None:
    head, mark, _ = README.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise SystemExit(f"{README} has no line {MARK.strip()!r}")
    README.write_text(f"{head}{mark}\n{table(Path(measured).read_text(encoding='utf-8').splitlines())}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
