"""Pictures that are served one by one, each by somebody else: fetched side by side, checked, and never asked for twice.

What became of each address stands in ``.links.tsv`` of the image folder, a line each, which is only appended to: a run that was
killed goes on behind its last whole line.
"""

from __future__ import annotations

import errno
import io
import json
import os
import queue
import re
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

from blip2x.errors import UserError
from blip2x.transfer.files import beside, locked
from blip2x.transfer.links import Link, read_links
from blip2x.transfer.progress import CountProgress, Say

ToRgb = Callable[[Image.Image, str], Image.Image]

RECORD = ".links.tsv"
WAITS = (1, 4, 16)  # seconds before another attempt
_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_ENDINGS = sorted(_FORMATS.values())
_FAILED = 255
_LINKS = 4096  # that are looked up at once
_CHUNK = 1 << 16
_HOSTS = 5  # that give no connection, one after the other: it is this machine that has none
_MANY = 1000  # addresses in a row without a connection are as telling, be they of one host
# Some servers refuse what names itself a script. Pictures are compressed already
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; blip2x)", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Limits:
    """Of one picture, and of all."""

    connections: int  # at a time
    timeout: float  # seconds, for a whole picture
    attempts: int  # in one run
    max_bytes: int
    max_pixels: int
    max_side: int | None  # larger ones are made smaller, as JPEG; None: they stay as they are
    retry_failed: bool  # ask again for what an earlier run could not fetch, or what has been removed since


@dataclass
class Outcome:
    """How many of a list's pictures are there, and why others are not."""

    there: int = 0
    fetched: int = 0  # of those
    failed: int = 0
    uncaptioned: int = 0  # of those that are there: not written among the captions
    reasons: Counter[str] = field(default_factory=Counter)  # of this run


class _Failed(Exception):
    """Why a picture cannot be had."""

    def __init__(self, reason: str, *, passing: bool = False, network: bool = False, local: bool = False):
        super().__init__(reason)
        self.passing = passing  # another attempt may help
        self.network = network  # it may be this machine that has no connection
        self.local = local  # maybe no server was asked at all


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
            record = _Record(images / RECORD)
            draft = captions and beside(captions, "new")
            if draft:
                draft.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8") if draft else open(os.devnull, "w") as file:
                for link, found in _looked_up(lists, record):
                    outcome.there += found is not None and found != _FAILED
                    outcome.failed += found == _FAILED
                    if found not in (None, _FAILED) and draft:
                        if not usable(link.caption or ""):
                            outcome.uncaptioned += 1
                            continue
                        row = {"image": _place(link, _ENDINGS[found]), "caption": link.caption}
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
    record = _Record(images / RECORD)
    recorded = gone = 0
    for link, code in _looked_up(lists, record):
        if code not in (None, _FAILED):
            recorded += 1
            gone += not _is_there(images, link, code)
    return gone + max(expected - recorded, 0)


def _is_there(images: Path, link: Link, found: int | None) -> bool:
    if found in (None, _FAILED):
        return False
    path = images / _place(link, _ENDINGS[found])
    return os.path.isfile(path) and path.stat().st_size > 0  # which takes a name that is too long for none


def _place(link: Link, ending: str) -> str:
    return link.name or f"{link.key[:3]}/{link.key[3:]}.{ending}"  # 4,096 folders


def _looked_up(lists: Iterable[Path], record: _Record) -> Iterator[tuple[Link, int | None]]:
    for path in lists:
        links = read_links(path)
        while some := list(islice(links, _LINKS)):
            yield from zip(some, record.look_up([link.key for link in some]), strict=True)


class _Record:
    """What became of each address; nine bytes of memory each."""

    def __init__(self, path: Path):
        keys, codes = array("Q"), array("B")
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    fields = line.split(b"\t")
                    # else the run was killed while it wrote, or the disk has lost some of it
                    if line.endswith(b"\n") and len(fields) == 3 and re.fullmatch(rb"[0-9a-f]{24}", fields[0]):
                        state = fields[1].decode(errors="replace")
                        keys.append(int(fields[0][:16], 16))
                        codes.append(_ENDINGS.index(state) if state in _ENDINGS else _FAILED)
        found = np.frombuffer(keys, dtype=np.uint64)
        order = np.argsort(found, kind="stable")  # the last line of an address holds
        self._keys = found[order]
        self._codes = np.frombuffer(codes, dtype=np.uint8)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def look_up(self, keys: Sequence[str]) -> list[int | None]:
        """The place of each picture's ending, or `_FAILED`; None: not asked for yet."""
        wanted = np.array([int(key[:16], 16) for key in keys], dtype=np.uint64)
        if not len(self._keys):
            return [None] * len(keys)
        place = np.searchsorted(self._keys, wanted, side="right") - 1
        hits = (place >= 0) & (self._keys[place] == wanted)
        return [int(self._codes[at]) if hit else None for at, hit in zip(place, hits, strict=True)]


class _Fetching:
    """One list's pictures on their way."""

    def __init__(self, images: Path, limits: Limits, outcome: Outcome, to_rgb: ToRgb, progress: CountProgress):
        self.images, self.limits, self.outcome, self.to_rgb, self.progress = images, limits, outcome, to_rgb, progress
        self._waiting: queue.Queue[tuple[Link, bool] | None] = queue.Queue(maxsize=4 * limits.connections)
        self._lock = threading.Lock()
        self._some = max(50, 2 * limits.connections)  # of them are enough to doubt the network
        self._held: list[bytes] = []  # failures that may be this machine's
        self._held_hosts: set[str | None] = set()
        self._held_one = ""  # of those, as an example
        self._is_answered = False
        self._trouble: BaseException | None = None
        self._local = threading.local()

    def run(self, path: Path) -> None:
        record = _Record(self.images / RECORD)
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

    def _pending(self, path: Path, record: _Record) -> Iterator[tuple[Link, bool]]:
        """Whose turn it is, and whether it is known to fail."""
        links = read_links(path)
        while some := list(islice(links, _LINKS)):
            seen = set()
            for link, found in zip(some, record.look_up([link.key for link in some]), strict=True):
                again = self.limits.retry_failed and not _is_there(self.images, link, found)
                if link.key not in seen and (found is None or again):
                    yield link, found == _FAILED
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
            ending, content = self._fetch(link)
            self._store(content, self.images / _place(link, ending))
        except _Failed as failure:
            tells = not failure.local and not (failure.network and has_failed)
            self._write(link, "-", str(failure), network=failure.network, tells=tells)
        else:
            self._write(link, ending, "")

    def _put_by_hand(self, path: Path, url: str) -> str | None:
        """The ending of a picture that is there under its name already; None: there is none that can be read."""
        try:
            return self._checked(path.read_bytes(), url)[0] if os.path.isfile(path) else None
        except _Failed:
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
                raise _Failed("a name that is too long for a file") from error
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

    def _fetch(self, link: Link) -> tuple[str, bytes]:
        for attempt in range(self.limits.attempts):
            try:
                return self._checked(self._download(link.url), link.url)
            except _Failed as failure:
                if not failure.passing or attempt + 1 == self.limits.attempts:
                    raise
            time.sleep(WAITS[min(attempt, len(WAITS) - 1)])
        raise AssertionError("there is at least one attempt")

    def _download(self, url: str) -> bytes:
        import requests
        from urllib3.exceptions import HTTPError, TimeoutError

        from blip2x.transfer import strangers

        if not hasattr(self._local, "session"):
            self._local.session = strangers.session()
        content = bytearray()
        try:
            end = time.monotonic() + self.limits.timeout
            with strangers.ask(self._local.session, url, end, _HEADERS) as answer:
                if not answer.ok:
                    busy = answer.status_code in (408, 429) or answer.status_code >= 500
                    raise _Failed(f"HTTP {answer.status_code}", passing=busy)
                while chunk := answer.raw.read1(_CHUNK):
                    content += chunk
                    if len(content) > self.limits.max_bytes:
                        raise _Failed(f"more than {self.limits.max_bytes:,} bytes")
        except strangers.NotPublicError as error:
            raise _Failed(
                "an address of this machine's own network", network=True
            ) from error  # a hotel's page to log in, maybe
        except requests.exceptions.ConnectTimeout as error:
            raise _Failed("no connection", passing=True, network=True) from error
        except (requests.Timeout, TimeoutError) as error:
            raise _Failed("too slow", passing=True) from error
        except HTTPError as error:
            raise _Failed("broke off", passing=True) from error
        except requests.ConnectionError as error:
            raise _Failed("no connection", passing=True, network=True) from error
        except (requests.RequestException, UnicodeError, ValueError) as error:  # addresses that are none, endless redirects
            raise _Failed(f"no answer that is one ({type(error).__name__})", local=True) from error
        return bytes(content)

    def _checked(self, content: bytes, url: str) -> tuple[str, bytes]:
        """The ending for a picture's name, and what to store."""
        try:
            with Image.open(io.BytesIO(content), formats=tuple(_FORMATS)) as picture:
                # MPO is what phones make: a JPEG that has others, of depth or another view, behind it
                ending = _FORMATS["JPEG" if picture.format == "MPO" else picture.format]
                width, height = picture.size
                if width * height > self.limits.max_pixels:
                    raise _Failed("too many pixels")
                if self.limits.max_side is not None and max(width, height) > self.limits.max_side:
                    return "jpg", _smaller(picture, self.limits.max_side, self.to_rgb, url)
                picture.load()  # what was cut off has a whole header
        except Image.DecompressionBombError:
            raise _Failed("too many pixels") from None
        except _Failed:
            raise
        except Exception as error:  # of Pillow's readers, which raise all sorts on what is broken
            raise _Failed("no picture that can be read") from error
        return ending, content


def _smaller(picture: Image.Image, side: int, to_rgb: ToRgb, url: str) -> bytes:
    picture.draft("RGB", (side, side))
    picture = to_rgb(ImageOps.exif_transpose(picture), url)  # the new file says nothing of how it is to be turned
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=95)
    return out.getvalue()
