"""The page about compare.py's measurements: python tests/speed/page.py docs/speed.json > docs/speed.md"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.speed.rows import CAPTION_WORDS, NAMES, ROWS, SIZES  # noqa: E402

Json = dict[str, Any]

SAME = 1e-3  # of the largest number: what rounding may change in float32, over dozens of layers
QUIET = 0.5  # processes that wanted a core, before anything was measured

_HEAD = """# Speed, beside Hugging Face's transformers and LAVIS's way

Made by `tests/speed/page.py` of [speed.json](speed.json), which one run of `tests/speed/compare.py` has written; do not edit it
by hand.
"""

_TABLE = """
A time is that of one unit, the shortest of the repeats. *Times as long* is a way's shortest time divided by blip2x's, in
brackets the least and the most of the turns, each beside blip2x's of the same turn: above 1, blip2x is faster. Memory is the
highest resident size of a process that does only this, libraries and weights included.

| what | way | a unit takes | times as long | results | memory, MiB |
|---|---|---|---|---|---|
"""

_HOW = """
## How it is measured

- Both sides load the same folders, in Hugging Face's format, of random weights in float32 that blip2x's export has written, and
  read the same pictures and token numbers. Decoding has the settings of `task=caption` and `task=vqa_zeroshot`.
- Each way of a row has a process of its own, which loads the model and runs once before anything is counted. Then the ways take
  turns while the others wait. All have the same number of threads; besides that each side is as its users find it: blip2x sets
  up its process (`blip2x/startup.py`), PyTorch has its defaults.
- A random model as good as never ends a text. The row of the end token among the embeddings is therefore longer than those of
  words, which makes it now likely and now unlikely, so that texts end after different numbers of words, or at the limit. A text
  of a random model says nothing, but every step of the search that leads to it does what it does with trained weights.
- Training steps are forward, backward and AdamW with the Q-Former's dropout. Their losses are compared before the first step,
  without dropout and with the same negatives; in the steps that are timed each side draws its own.
- LAVIS's way is written out of the modules of transformers: what LAVIS computes, in its order, with its loops over rows.
  Its own attention is not PyTorch's fused one, which the image encoder has here, so these rows favour LAVIS.
- How blip2x's own cost grows with batches, tokens, images and ranks: [cost.md](cost.md).

## Again

In blip2x's environment, with PyTorch in another one (transformers 4.57 and paddlenlp exclude each other's tokenizers):

    python -m venv ~/parity && ~/parity/bin/pip install --group parity      # its PYTHON is ~/parity/bin/python
    {command}
    python tests/speed/page.py docs/speed.json > docs/speed.md

`--model tiny_opt` and `--model tiny_t5` show in a minute or two that all rows work; their times are those of calls, not of
arithmetic. `--rows caption,vqa` measures some rows alone. Nothing else should run on the machine meanwhile.
"""


def page(record: Json) -> str:
    """Markdown."""
    machine, versions = record["machine"], record["versions"]
    about = f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_gb']} GB, {machine['system']}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "git_commit" and version)
    lines = [
        _HEAD,
        f"`model={record['model']}`, threads: {record['threads']}, {record['date']}. Machine: {about}.",
        _load(record["load_before"]),
        f"Versions: {named}; blip2x at commit {str(versions['git_commit'])[:10]}.\n",
        _slower(record["rows"]),
        _TABLE + "\n".join(line for name, row in record["rows"].items() for line in _lines(name, row)),
        "\n## What the ways do\n",
        *(_ways(name, record) for name in record["rows"]),
        _HOW.format(command=record["command"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _load(load: float) -> str:
    if load < QUIET:
        return "Nothing else ran."
    return f"**The machine was busy with other work ({load:.1f} processes beside this one), so the times say little.**"


def _slower(rows: Json) -> str:
    found, failed = [], []
    for name, row in rows.items():
        _, first = _first(row)
        found += [
            f"{ROWS[name].title} ({1 / _ratio(way, first):.2f} times {NAMES[which]}'s time)"
            for which, way in row["ways"].items()
            if way.get("seconds") and first.get("seconds") and which != "recomputed" and _ratio(way, first) < 1
        ]
        failed += [f"{ROWS[name].title}: {NAMES[which]}" for which, way in row["ways"].items() if _failed(way)]
    if found:
        said = _list("blip2x is slower in:", found)
    else:
        said = f"blip2x is slower in none of the rows{' as far as none failed' if failed else ''}."
    return "\n\n".join([said, *([_list("Failed, in whole or in part:", failed)] if failed else [])])


def _list(title: str, lines: list[str]) -> str:
    return f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines)


def _failed(way: Json) -> bool:
    return "error" in way or not way.get("seconds")


def _first(row: Json) -> tuple[str, Json]:
    return next(iter(row["ways"].items()))


def _ratio(way: Json, first: Json) -> float:
    return min(way["seconds"]) / min(first["seconds"])


def _lines(name: str, row: Json) -> list[str]:
    """The first names the row."""
    lines = []
    first_name, first = _first(row)
    for which, way in row["ways"].items():
        title = f"{ROWS[name].title}, {row['count']} {ROWS[name].unit}{'s' * (row['count'] > 1)}" if which == first_name else ""
        if not way.get("seconds"):
            lines.append(f"| {title} | {NAMES[which]} | failed: {way.get('error', 'not run')} | | | |")
            continue
        ratio = "1"
        if which != first_name and first.get("seconds"):
            turns = [other / own for other, own in zip(way["seconds"], first["seconds"], strict=False)]
            ratio = f"**{_ratio(way, first):.2f}** ({min(turns):.2f} to {max(turns):.2f})"
        memory = f"{way['peak_mib']:,.0f}" if "peak_mib" in way else ""
        seconds = _time(min(way["seconds"]) / row["count"])
        results = _results(way.get("compared"))
        if "error" in way:
            turns = len(way["seconds"])
            results = f"**failed after {turns} turn{'s' * (turns > 1)}: {way['error']}**"
        lines.append(f"| {title} | {NAMES[which]} | {seconds} | {ratio} | {results} | {memory} |")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _results(compared: Json | None) -> str:
    if compared is None:
        return ""
    if "same" in compared:
        least, most = compared["words"]
        return f"{compared['same']} of {compared['of']} texts equal, of {least} to {most} words"
    text = f"differ by {compared['difference']:.1e} of {compared['largest']:.3g}"
    return text if compared["difference"] < SAME * compared["largest"] else f"**{text}**"


def _ways(name: str, record: Json) -> str:
    row, count = ROWS[name], record["rows"][name]["count"]
    ways = "\n".join(f"  - {NAMES[way]}: {does}." for way, does in row.ways.items())
    return f"- {row.title} ({count} in a run{_more(name, record['model'])})\n{ways}"


def _more(name: str, model: str) -> str:
    sizes, (least, most) = SIZES[model], CAPTION_WORDS
    return {
        "vqa": f", about {sizes.asked} images, {sizes.batch} at a time",
        "rerank": f", {sizes.judged} images with {sizes.candidates} texts each, {sizes.batch} pairs at a time",
        **dict.fromkeys(("stage1", "stage1_features", "stage2"), f", texts of {least} to {most} words, padded to the longest"),
    }.get(name, "")


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
