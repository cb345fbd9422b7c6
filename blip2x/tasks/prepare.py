"""Fetch a data set's files, unpack them, and check what is there; what has been done once is not done again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from blip2x.config.dataset import ByHand, Content, ImageTextConfig, LinkedImages, RemoteFile
from blip2x.config.run import RunConfig
from blip2x.config.tools import PrepareConfig
from blip2x.data.pictures import to_rgb
from blip2x.data.tokenize import clean_caption
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.registry import TASKS
from blip2x.tasks.common.prepared_files import Files, State, by_hand_state, places, require_space
from blip2x.transfer.link_record import RECORD
from blip2x.transfer.linked_images import fetch_linked, missing_images
from blip2x.transfer.linked_picture import Limits
from blip2x.transfer.prepared import Prepared
from blip2x.transfer.progress import Board, byte_count
from blip2x.transfer.several import run_several

if TYPE_CHECKING:
    from blip2x.engine.run import Run  # which imports paddle

T = TypeVar("T")


@dataclass(frozen=True)
class Linked:
    """Images that are fetched one by one, and their folder."""

    images: Path
    cfg: LinkedImages


@dataclass(frozen=True)
class Plan:
    """What a data set is made of, each thing once, by names that are told apart."""

    files: dict[str, RemoteFile]
    by_hand: dict[str, ByHand]
    linked: dict[str, Linked]

    @classmethod
    def of(cls, dataset: ImageTextConfig, task: PrepareConfig) -> Plan:
        """Everything that `task` wants of `dataset`.

        Raises:
            UserError: two files are to be at one path, a file is not described well, or `task.skip` names what there is not.
        """
        parts = dataset.parts.items()
        files = _named({part: cfg.files for part, cfg in parts})
        hands = _named({part: cfg.by_hand for part, cfg in parts})
        links = _named(
            {part: {name: Linked(Path(cfg.images), each) for name, each in cfg.linked.items()} for part, cfg in parts}
        )
        known = {name.split(".")[-1] for name in (*files, *hands, *links)}
        if unknown := [name for name in task.skip if name not in known]:
            raise UserError(f"task.skip: {dataset.name} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        _check_files(files)

        def wanted(things: Mapping[str, T]) -> dict[str, T]:
            chosen = {name: thing for name, thing in things.items() if name.split(".")[-1] not in task.skip}
            return {
                name: thing
                for name, thing in chosen.items()
                if task.images or getattr(thing, "content", Content.images) is Content.annotations
            }

        return cls(wanted(files), wanted(hands), wanted(links))


@TASKS.register("prepare")
class Prepare:
    """Neither weights nor a GPU are needed."""

    computes: ClassVar[bool] = False

    def __init__(self, cfg: RunConfig, run: Run):
        self.cfg, self.console = cfg, run.console
        self.task: PrepareConfig = cfg.task
        self.plan = Plan.of(cfg.dataset, cfg.task)
        self.known = Prepared(Path(cfg.paths.data))
        self.files = Files(self.known, keep_archives=cfg.task.keep_archives)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise `UserError` where the data set has nothing to fetch, or what it says about its files cannot be followed."""
        if not isinstance(cfg.dataset, ImageTextConfig):
            raise UserError(f"dataset={cfg.dataset.name} has nothing that could be fetched; it is used as it is")
        Plan.of(cfg.dataset, cfg.task)

    def run(self) -> TaskResult:
        """Fetch and unpack what is not there, or verify all, and show it; how many things and bytes there are.

        Raises:
            UserError: at the end, with what is missing and what to do about it.
        """
        for name, part in self.cfg.dataset.parts.items():
            if part.licence:
                self._say(f"licence of {name}: {part.licence}")
        states = self._verify() if self.task.verify else self._prepare()
        self.console.print(_table(states, self.plan))
        troubles = [f"{name}: {state.trouble}" for name, state in states.items() if state.trouble]
        if troubles:
            raise UserError("\n  ".join([f"{self.cfg.dataset.name} is not complete:", *troubles]))
        self._say(f"next: {next_command(self.cfg.dataset)}")
        gigabytes = sum(state.size or 0 for state in states.values()) / 1e9
        fetched = sum(state.state == "fetched" for state in states.values())
        return TaskResult({"things": len(states), "fetched": fetched, "gigabytes": gigabytes})

    def _prepare(self) -> dict[str, State]:
        found = {name: self.files.found(file) for name, file in self.plan.files.items()}
        wanted = {name: self.plan.files[name] for name, state in found.items() if state is None}
        if self.cfg.paths.offline:  # what lies there packed can be unpacked all the same
            absent = {name: file for name, file in wanted.items() if not Path(file.path).is_file()}
            found |= {name: State("missing", file.size, _by_yourself(file)) for name, file in absent.items()}
            wanted = {name: file for name, file in wanted.items() if name not in absent}
        if wanted:
            require_space(wanted.values(), self.task.parallel, self.task.keep_archives)
            with Board() as board:
                jobs = {name: partial(self.files.fetch, file, board) for name, file in wanted.items()}
                for name, result in run_several(jobs, self.task.parallel, board).items():
                    is_error = isinstance(result, UserError)
                    found[name] = State("failed", wanted[name].size, str(result)) if is_error else result
        for name, state in found.items():
            if state.state == "there":
                self.files.tidy(self.plan.files[name])
        found |= {name: by_hand_state(thing) for name, thing in self.plan.by_hand.items()}
        return found | {name: self._fetch_linked(name, linked) for name, linked in self.plan.linked.items()}

    def _verify(self) -> dict[str, State]:
        hint = f"python runners/run.py task=prepare dataset={self.cfg.dataset.name} fetches it"
        states = {name: self.files.verify(file, hint) for name, file in self.plan.files.items()}
        states |= {name: by_hand_state(thing) for name, thing in self.plan.by_hand.items()}
        for name, linked in self.plan.linked.items():
            states[name] = self._verify_linked(name, linked, hint)
        return states

    def _fetch_linked(self, name: str, linked: Linked) -> State:
        absent = [path for path in linked.cfg.lists if not Path(path).is_file()]
        if absent:
            return State("missing", None, f"its images cannot be fetched without {', '.join(absent)}")
        state = None if self.task.links.retry_failed else self._found_linked(name, linked)
        if state:
            return state
        if self.cfg.paths.offline:
            why = "paths.offline=true, so no image is fetched; fetch them where there is a network and copy"
            return State("missing", None, f"{why} {linked.images}, with {RECORD}, and {self.known.path}")
        options = self.task.links
        limits = Limits(
            options.connections,
            options.timeout,
            options.attempts,
            max_bytes=int(options.max_mb * 1e6),
            max_pixels=self.cfg.dataset.max_pixels,
            max_side=options.max_side,
            retry_failed=options.retry_failed,
        )
        captions = linked.cfg.captions and Path(linked.cfg.captions)
        self._say(f"{name}: fetching images one by one into {linked.images}")
        try:
            lists = [Path(path) for path in linked.cfg.lists]
            outcome = fetch_linked(lists, linked.images, captions, limits, to_rgb, usable=clean_caption)
        except UserError as error:
            return State("failed", None, str(error))
        why = ", ".join(f"{count:,} {reason}" for reason, count in outcome.reasons.most_common(5))
        bare = f", {outcome.uncaptioned:,} of them left out for want of a usable caption" if outcome.uncaptioned else ""
        gone = f"{outcome.failed:,} cannot be had{f' ({why})' if why else ''}"
        self._say(f"{name}: {outcome.there:,} images are there{bare}, {gone}")
        entry = {"wanted": _wanted_links(linked), "there": outcome.there, "failed": outcome.failed}
        self.known.put(_entry(name, linked), entry)
        return State("fetched" if outcome.fetched else "there", None, _lacking(linked, entry))

    def _found_linked(self, name: str, linked: Linked) -> State | None:
        """What an earlier run has fetched, to its end; None: there was none, or its list has changed."""
        entry = self.known.get(_entry(name, linked))
        captions = linked.cfg.captions
        if entry.get("wanted") != _wanted_links(linked) or (captions and not Path(captions).is_file()):
            return None
        return State("there", None, _lacking(linked, entry)) if (linked.images / RECORD).is_file() else None

    def _verify_linked(self, name: str, linked: Linked, hint: str) -> State:
        state = self._found_linked(name, linked)
        if state is None:
            return State("missing", None, f"{linked.images} is not complete; {hint}")
        expected = self.known.get(_entry(name, linked)).get("there", 0)
        gone = missing_images([Path(path) for path in linked.cfg.lists], linked.images, expected)
        if gone:
            trouble = f"{gone:,} images of {linked.images} are gone; {hint} with task.links.retry_failed=true"
            return State("wrong", None, trouble)
        return State("wrong" if state.trouble else "verified", None, state.trouble)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def next_command(dataset: ImageTextConfig) -> str:
    """What the data set is for: answers where it has questions to evaluate on, captions, or training."""
    files = [part.splits[dataset.eval_split] for part in dataset.parts.values() if dataset.eval_split in part.splits]
    task = "task=pretrain_stage1 model=opt2.7b"
    if dataset.eval_split != dataset.train_split and any(each.questions for each in files):
        task = "task=vqa_zeroshot model=opt2.7b model.weights=STAGE2/checkpoint"
    elif dataset.eval_split != dataset.train_split and any(each.captions for each in files):
        task = "task=caption model=opt2.7b model.weights=STAGE2/checkpoint"
    return f"python runners/run.py {task} dataset={dataset.name}"


def _named(groups: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """All things of all parts, each once; the part's name stands before that of a thing which several have differently."""
    found: dict[str, T] = {}
    for part, things in groups.items():
        for name, thing in things.items():
            if thing not in found.values():
                found[f"{part}.{name}" if name in found else name] = thing
    return found


def _check_files(files: Mapping[str, RemoteFile]) -> None:
    owners: dict[str, str] = {}
    for name, file in files.items():
        if bool(file.unpack) != bool(file.gives):
            raise UserError(f"{name}: unpack and gives go together, got unpack={file.unpack} and gives={file.gives}")
        for inner in file.gives:
            if inner.startswith("/") or ".." in inner.split("/") or inner != inner.strip("/") or not inner:
                raise UserError(f"{name}: gives has {inner!r}, which is no path below {file.unpack}")
        for place in {os.path.abspath(path) for path in (file.path, *places(file))}:
            if owners.setdefault(place, name) != name:
                raise UserError(f"dataset.parts: {owners[place]} and {name} are both to be {place}")


def _by_yourself(file: RemoteFile) -> str:
    what = "" if file.unpack is None else f", or its content as {', '.join(map(str, places(file)))}"
    return f"paths.offline=true, so it is not fetched; put {file.url} there as {file.path}{what}"


def _entry(name: str, linked: Linked) -> Path:
    return linked.images / f"{RECORD}#{name.split('.')[-1]}"


def _wanted_links(linked: Linked) -> dict[str, Any]:
    sizes = [[Path(path).name, os.stat(path).st_size] for path in linked.cfg.lists if Path(path).is_file()]
    return {"lists": sizes, "captions": linked.cfg.captions and Path(linked.cfg.captions).name}


def _lacking(linked: Linked, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with failures; where captions are written of what is there, some are expected."""
    if entry["there"] and (linked.cfg.captions or not entry["failed"]):
        return None
    return (
        f"{entry['failed']:,} of {entry['failed'] + entry['there']:,} images could not be fetched; why is in "
        f"{linked.images / RECORD}; task.links.retry_failed=true tries them again"
    )


def _table(states: Mapping[str, State], plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("file", "size", "state", "where"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    where = {name: "\n".join(map(str, places(file))) for name, file in plan.files.items()}
    where |= {name: thing.path for name, thing in plan.by_hand.items()}
    where |= {name: str(linked.images) for name, linked in plan.linked.items()}
    for name, state in states.items():
        size = "" if state.size is None else byte_count(state.size)
        style = "red" if state.trouble else "green"
        table.add_row(Text(name), size, Text(state.state, style=style), Text(where[name]))
    return table
