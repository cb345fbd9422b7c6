"""What ``python runners/run.py --help`` prints: the groups of conf/ and their options, in the words of the files themselves.

Hydra's own listing copies the whole configuration for every folder it looks into, which takes seconds.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from blip2x.config.auto import CONF_FOLDER

_HEAD = """\
blip2x: BLIP-2 on PaddlePaddle.

Usage: python runners/run.py [group=option] [key=value] ...

  python runners/run.py                                          the demo: five minutes on two CPU cores
  python runners/run.py task=caption model=opt2.7b dataset=coco  one task
  python runners/run.py experiment=vqav2_zeroshot_opt2.7b        a named setting, such as a result of the paper
  python runners/run.py -m task=vqa_zeroshot task.num_beams=1,5  a sweep: a run for each value (docs/sweeps.md)

Groups and their options; * is what is taken when nothing is typed.
"""
_FOOT = """\
Every key of the config can be set as well, e.g. optim.lr=1e-4.

  --cfg job     print the config that the other words make, with --resolve its references filled in
  --hydra-help  Hydra's own options
"""
# `  - task: pipeline            # what to do`
_GROUP = re.compile(r"^ +- (?P<group>\w+): (?P<default>\S+) +# (?P<meaning>.+)$", re.MULTILINE)


def help_text(width: int) -> str:
    """All groups in the order of conf/config.yaml, each option with the first sentence of its file, on lines of `width`."""
    text = (CONF_FOLDER / "config.yaml").read_text(encoding="utf-8")
    blocks = [_block(match["group"], match["default"], match["meaning"], width) for match in _GROUP.finditer(text)]
    return "\n".join([_HEAD, *blocks, _FOOT])


def _block(group: str, default: str, meaning: str, width: int) -> str:
    lines = [f"{group}= {meaning}"]
    options = {path.stem: _summary(path) for path in sorted((CONF_FOLDER / group).glob("*.yaml"))}
    column = max(map(len, options))
    for name, summary in options.items():
        start = f"{'*' if name == default else ' ':>3} {name:<{column}}  "
        lines.append(start + textwrap.shorten(summary, max(width - len(start), 20), placeholder=" ..."))
    for part, names in _parts(CONF_FOLDER / group):
        lines += textwrap.wrap(f"{group}/{part}= {', '.join(names)}", width, initial_indent="    ", subsequent_indent=" " * 6)
    return "\n".join([*lines, ""])


def _parts(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The groups inside a group, with their options."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield inner.name, sorted(path.stem for path in inner.glob("*.yaml"))


def _summary(path: Path) -> str:
    """The first sentence of a file's comment; a command after a colon is left out."""
    comments = re.findall(r"^# (?!@package)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return re.split(r"\. |: python ", comments[0])[0].rstrip(".") if comments else ""
