"""Pictures that are served one by one, each by somebody else: fetched side by side, checked, and never asked for twice.

What became of each address stands in ``.links.tsv`` of the image folder, a line each, which is only appended to: a run that was
killed goes on behind its last whole line.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from blip2x.errors import UserError
from blip2x.transfer.files import beside, locked
from blip2x.transfer.link_record import ENDINGS, FAILED, RECORD, Record, is_there, place
from blip2x.transfer.linked_picture import FetchFailed, Limits, PictureFetcher, ToRgb
from blip2x.transfer.links import Link, read_links
from blip2x.transfer.progress import CountProgress, Say

_LINKS = 4096  # that are looked up at once
_HOSTS = 5  # that give no connection, one after the other: it is this machine that has none
_MANY = 1000  # addresses in a row without a connection are as telling, be they of one host


@dataclass
class Outcome:
    """How many of a list's pictures are there, and why others are not."""

    there: int = 0
    fetched: int = 0  # of those
    failed: int = 0
    uncaptioned: int = 0  # of those that are there: not written among the captions
    reasons: Counter[str] = field(default_factory=Counter)  # of this run


def fetch_linked(
    lists: Sequence[Path],
    images: Path,
    captions: Path | None,
    limits: Limits,
    to_rgb: ToRgb,
    say: Say | None = None,
    usable: Callable[[str], object] = str.strip,
) -> Outcome:
    """Fetch what `lists` name into `images`, and write `captions` of what could be fetched.

    Args:
        lists: see `read_links`. Lists may share pictures.
        images: a picture is ``abc/def….jpg`` in it, by its address, or has the name that its list gives.
        captions: JSONL with "image", below `images`, and "caption", in the order of the lists; None: none is written.
        limits: of connections, sizes and time.
        to_rgb: for pictures that are made smaller: (opened picture, its address) -> RGB.
        say: gets lines; None: one line that changes on a terminal, else lines on standard error.
        usable: whether there is anything in a caption; pictures without such a one are not written among the captions.

    Raises:
        UserError: a list cannot be read, no server answers at all, or the disk is full.
    """
    outcome = Outcome()
    try:
        images.mkdir(parents=True, exist_ok=True)
        with locked(images / RECORD, say):
            for path in lists:
                with CountProgress(path.name, say) as progress:
                    _Fetching(images, limits, outcome, to_rgb, progress).run(path)
            record = Record(images / RECORD)
            draft = captions and beside(captions, "new")
            if draft:
                draft.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8") if draft else open(os.devnull, "w") as file:
                for link, found in _looked_up(lists, record):
                    outcome.there += found is not None and found != FAILED
                    outcome.failed += found == FAILED
                    if found not in (None, FAILED) and draft:
                        if not usable(link.caption or ""):
                            outcome.uncaptioned += 1
                            continue
                        row = {"image": place(link, ENDINGS[found]), "caption": link.caption}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if draft:
                draft.replace(captions)
    except OSError as error:
        raise UserError(f"{images} cannot be written: {error.strerror or error}") from error
    return outcome


def missing_images(lists: Sequence[Path], images: Path, expected: int = 0) -> int:
    """How many of the pictures that have been fetched are gone or empty; `Limits.retry_failed` fetches them, too.

    Args:
        lists: as `fetch_linked` has got them.
        images: the same.
        expected: how many there were, so that those count whose record is gone, too.

    Raises:
        UserError: a list cannot be read.
    """
    record = Record(images / RECORD)
    recorded = gone = 0
    for link, code in _looked_up(lists, record):
        if code not in (None, FAILED):
            recorded += 1
            gone += not is_there(images, link, code)
    return gone + max(expected - recorded, 0)


def _looked_up(lists: Iterable[Path], record: Record) -> Iterator[tuple[Link, int | None]]:
    for path in lists:
        links = read_links(path)
        while some := list(islice(links, _LINKS)):
            yield from zip(some, record.look_up([link.key for link in some]), strict=True)


class _Fetching:
    """One list's pictures on their way."""

    def __init__(self, images: Path, limits: Limits, outcome: Outcome, to_rgb: ToRgb, progress: CountProgress):
        self.images, self.limits, self.outcome, self.progress = images, limits, outcome, progress
        self._fetcher = PictureFetcher(limits, to_rgb)
        self._waiting: queue.Queue[tuple[Link, bool] | None] = queue.Queue(maxsize=4 * limits.connections)
        self._lock = threading.Lock()
        self._some = max(50, 2 * limits.connections)  # of them are enough to doubt the network
        self._held: list[bytes] = []  # failures that may be this machine's
        self._held_hosts: set[str | None] = set()
        self._held_one = ""  # of those, as an example
        self._is_answered = False
        self._trouble: BaseException | None = None

    def run(self, path: Path) -> None:
        record = Record(self.images / RECORD)
        with (self.images / RECORD).open("ab+", buffering=0) as self._file:
            if self._file.tell() and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
                self._file.write(b"\n")
            threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.limits.connections)]
            for thread in threads:
                thread.start()
            try:
                for work in self._pending(path, record):
                    self._hand(work)
                for _ in threads:
                    self._hand(None)
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.1)
                        self._require_fine()
                self._require_fine()
                # a few that were left of an earlier run may all be dead
                if self._held and not self._is_answered and (len(self._held) >= self._some or not len(record)):
                    raise self._no_network()
                self._write_held()
            except BaseException as error:
                self._trouble = self._trouble or error  # threads end at their next picture
                raise

    def _pending(self, path: Path, record: Record) -> Iterator[tuple[Link, bool]]:
        """Whose turn it is, and whether it is known to fail."""
        links = read_links(path)
        while some := list(islice(links, _LINKS)):
            seen = set()
            for link, found in zip(some, record.look_up([link.key for link in some]), strict=True):
                again = self.limits.retry_failed and not is_there(self.images, link, found)
                if link.key not in seen and (found is None or again):
                    yield link, found == FAILED
                seen.add(link.key)

    def _hand(self, work: tuple[Link, bool] | None) -> None:
        while True:
            self._require_fine()
            try:
                self._waiting.put(work, timeout=0.1)
                return
            except queue.Full:
                continue

    def _require_fine(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    def _work(self) -> None:
        while self._trouble is None:
            try:
                work = self._waiting.get(timeout=0.2)  # whoever hands out may have given up
                if work is None:
                    return
                self._one(*work)
            except queue.Empty:
                continue
            except BaseException as error:
                self._trouble = error

    def _one(self, link: Link, has_failed: bool) -> None:
        if link.name and (ending := self._put_by_hand(self.images / link.name, link.url)):
            self._write(link, ending, "", tells=False)
            return
        try:
            ending, content = self._fetcher.fetch(link.url)
            self._store(content, self.images / place(link, ending))
        except FetchFailed as failure:
            tells = not failure.local and not (failure.network and has_failed)
            self._write(link, "-", str(failure), network=failure.network, tells=tells)
        else:
            self._write(link, ending, "")

    def _put_by_hand(self, path: Path, url: str) -> str | None:
        """The ending of a picture that is there under its name already; None: there is none that can be read."""
        try:
            return self._fetcher.checked(path.read_bytes(), url)[0] if os.path.isfile(path) else None
        except FetchFailed:
            return None

    def _store(self, content: bytes, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        draft = target.with_name(f".{threading.get_ident()}.new")
        try:
            draft.write_bytes(content)
            draft.replace(target)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno == errno.ENAMETOOLONG:
                raise FetchFailed("a name that is too long for a file") from error
            raise

    def _write(self, link: Link, state: str, reason: str, *, network: bool = False, tells: bool = True) -> None:
        """`tells`: whether it says something of this machine's connection."""
        line = f"{link.key}\t{state}\t{' '.join(reason.split())}\n".encode()
        with self._lock:
            if self._trouble is not None:  # the record may be closed by now
                return
            if reason:
                self.outcome.reasons[reason] += 1
            else:
                self.outcome.fetched += tells
            self.progress.at(self.outcome.fetched, self.outcome.reasons.total())
            if not tells:
                self._file.write(line)
                return
            if network:
                self._held.append(line)
                self._held_one = f"{link.url} ({reason})"
                self._held_hosts.add(urlsplit(link.url).hostname)
                if len(self._held) >= (self._some if len(self._held_hosts) >= _HOSTS else max(self._some, _MANY)):
                    raise self._no_network()
                return
            self._is_answered = True
            self._write_held()
            self._file.write(line)

    def _no_network(self) -> UserError:
        return UserError(
            f"the last {len(self._held):,} addresses gave no connection at all, {self._held_one} among them; check your "
            "network and use the same command again: what has come is kept"
        )

    def _write_held(self) -> None:
        if self._held:
            self._file.write(b"".join(self._held))
            self._held = []
        self._held_hosts.clear()
