"""Large files from the web: whole or not at all, resumed where the last attempt ended, fetched by one process at a time.

Beside ``name`` there are, while it is being fetched, ``.name.partial`` with what has come and ``.name.partial.json`` with what
the server said about it; afterwards ``.name.origin.json``, which tells where it came from.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2x.errors import UserError
from blip2x.transfer.files import beside, digest, locked, move, read_json, write_json
from blip2x.transfer.progress import Board, Say, TransferProgress, byte_count

if TYPE_CHECKING:
    from requests import Response

WAITS = (1, 2, 4, 8, 16)  # seconds before another attempt, after one, two, ... that failed in a row
ENOUGH = 8 * 2**20  # an attempt that brought as many bytes has not failed: a long download may break off many times
_TIMEOUT = (20, 60)  # seconds to connect, and between two pieces of the answer
_CHUNK = 1 << 16


class NotServedError(UserError):
    """The server has no such file, or does not give it to everybody."""


class _Trouble(Exception):
    """What may be gone at the next attempt."""


@dataclass(frozen=True)
class _Remote:
    """What a server says about a file."""

    url: str
    size: int | None
    sha256: str | None  # published by Hugging Face
    md5: str | None  # published by Google's and Baidu's storage
    validator: str | None  # an ETag or date, which changes with the content

    def is_same(self, other: _Remote) -> bool:
        """Whether both are surely one content, so that its parts fit together."""
        if self.size is not None and other.size is not None and self.size != other.size:
            return False
        if self.sha256 or other.sha256:  # the servers that Hugging Face redirects to have validators of their own, or none
            return self.sha256 == other.sha256
        return self.validator == other.validator


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    say: Say | None = None,
    board: Board | None = None,
) -> Path:
    """Fetch `url` into the file `path`, unless it is there; an earlier attempt that broke off is continued.

    Args:
        url: http:// or https://.
        path: appears only when all has come and is checked: against `size`, `sha256` and `md5`, the length that the
            server announces, and the checksum that it publishes.
        sha256: in hexadecimal, where it is known.
        md5: the same.
        size: bytes, where it is known.
        say: gets lines about the progress; None: a bar on standard error, or lines where that is not a terminal.
        board: where several transfers are shown, which takes the place of `say`.

    Raises:
        Stopped: the board was told to stop; what has come is kept.
        NotServedError: the file does not exist, or not for everybody.
        UserError: no connection, another HTTP error, another size or checksum, or the disk is full or cannot be written.
    """
    import requests

    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"{url} is no web address; it must start with http:// or https://")
    known = {name: checksum.lower() for name, checksum in (("sha256", sha256), ("md5", md5)) if checksum}
    try:
        if _is_there(path, known, size):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with TransferProgress(path.name, say, board) as progress, locked(path, progress.say):
            if not _is_there(path, known, size):  # another process may have fetched it meanwhile
                _Transfer(url, path, known, size, progress).run()
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be fetched: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read_origin(path: Path) -> dict[str, Any] | None:
    """The "url", "size" and "sha256" of a file that `download` has fetched; None: it came otherwise."""
    return read_json(beside(path, "origin.json"))


class _Transfer:
    """One file on its way."""

    def __init__(self, url: str, path: Path, known: dict[str, str], size: int | None, progress: TransferProgress):
        self.url, self.path, self.known, self.progress = url, path, known, progress
        self.size = size
        self.partial, self.state = beside(path, "partial"), beside(path, "partial.json")
        self.remote: _Remote | None = None
        self.answered = False

    @property
    def have(self) -> int:
        """Bytes that have come."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    @property
    def expected(self) -> int | None:
        """Bytes of the whole file."""
        return self.size if self.size is not None or self.remote is None else self.remote.size

    def run(self) -> None:
        """Fetch what is missing, check everything, and put the file in its place."""
        import requests

        failures = most = 0
        before = trouble = ""
        while not self._is_complete():
            before = trouble
            try:
                self._attempt()
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                here = f"the connection broke off at {self._so_far()}"
                trouble = here if self.answered else f"no connection ({type(error).__name__})"
            except _Trouble as error:
                trouble = str(error)
            failures += 1
            if self.have - most >= ENOUGH:
                failures, most = 1, self.have
            # without any answer the address or the network is at fault, which waiting seldom mends
            if failures > (len(WAITS) if self.answered else 1):
                kept = self.have and self.remote and self._can_continue(self.remote)
                hint = "what has come is kept, the same command continues" if kept else "check the address and your network"
                what = ", then ".join(dict.fromkeys(filter(None, (before, trouble))))
                raise UserError(f"{self.url} cannot be fetched: {what}; {failures} attempts did not help; {hint}")
            wait = WAITS[failures - 1]
            self.progress.say(f"{self.path.name}: {trouble}; trying again in {wait:g} s")
            time.sleep(wait)
        self._finish()

    def _is_complete(self) -> bool:
        """Whether all has come before; removes what has come if it is not known what it is part of."""
        stored = read_json(self.state)
        try:
            remote = _Remote(**stored) if stored else None
        except TypeError:  # written by another version
            remote = None
        if remote and self._can_continue(remote):
            self.remote = remote
        else:
            self._discard()
        return self.partial.is_file() and self.have == self.expected

    def _can_continue(self, remote: _Remote) -> bool:
        """Whether more can be put behind what came from `remote`, and a change of the file would be noticed."""
        return bool(remote.sha256 or (remote.url == self.url and (remote.validator or self.known)))

    def _attempt(self) -> None:
        import requests

        have = self.have
        headers = {"Accept-Encoding": "identity"}  # lengths and checksums are those of the file itself
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.remote.validator and not self.remote.sha256:  # with a checksum, `_begin` compares that
                headers["If-Range"] = self.remote.validator
        with requests.get(self.url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            self.answered = True
            have = self._begin(answer, have)
            with self.partial.open("ab") as file:
                for chunk in answer.iter_content(_CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if self.expected is not None and have > self.expected:
                        raise self._wrong(f"more than the {self.expected:,} bytes that it should have came")
                    self.progress.at(have, self.expected)
        if self.expected is not None and have < self.expected:
            raise _Trouble(f"the connection broke off at {self._so_far()}")

    def _begin(self, answer: Response, have: int) -> int:
        """Bytes that are there and that `answer` continues."""
        self._check_status(answer, have)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{self.url} comes compressed, though that was not asked for; fetch it yourself as {self.path}")
        remote = self._remote(answer, have)
        if answer.status_code == 206:
            if not self.remote or not self.remote.is_same(remote):
                raise self._anew("the file on the server is not the one that was begun")
        else:
            if have:
                self.progress.say(f"{self.path.name}: the server does not continue it, so it starts anew")
            self._discard()
            self.remote, have = remote, 0
            write_json(self.state, asdict(remote))
        self._check_promises(answer)
        if self.expected is not None:
            _require_space(self.path, self.expected - have)
        self.progress.begin(self.url, have, self.expected)
        return have

    def _check_status(self, answer: Response, have: int) -> None:
        status = f"{answer.status_code} {answer.reason}"
        if answer.status_code in (401, 403):
            raise NotServedError(
                f"{self.url} is refused (the server answers {status}): it is not there, or only for those who have agreed to "
                "its terms or logged in"
            )
        if answer.status_code in (404, 410):
            raise NotServedError(f"{self.url} does not exist (the server answers {status})")
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _Trouble(f"the server answers {status}")
        if answer.status_code == 416 and have:
            raise self._anew("the server has no more of the file than was here already")
        if answer.status_code not in (200, 206):
            raise UserError(f"{self.url} cannot be fetched: the server answers {status}")

    def _remote(self, answer: Response, have: int) -> _Remote:
        headers = answer.headers
        length = _number(headers.get("Content-Length"))
        if answer.status_code == 206:
            part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not part or int(part[1]) != have:
                raise self._anew("the server sends another part of the file than was asked for")
            length = _number(part[2]) or (None if length is None else have + length)
        sha256 = size = None
        for each in (*answer.history, answer):  # Hugging Face tells them before it redirects to where the content is
            if found := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', each.headers.get("X-Linked-Etag", "")):
                sha256 = found[1]
            size = _number(each.headers.get("X-Linked-Size")) or size
        if length is not None and size is not None and length != size:
            raise self._wrong(f"the server announces {length:,} bytes of a file that should have {size:,}")
        md5 = re.search(r"\bmd5=([\w+/]+=*)", headers.get("x-goog-hash", ""))
        md5_base64 = md5[1] if md5 else headers.get("Content-MD5", "")
        if headers.get("x-goog-stored-content-encoding", "identity") != "identity":
            md5_base64 = ""  # of the compressed content, which is not what comes
        etag = headers.get("ETag", "W/")
        return _Remote(
            url=self.url,
            size=size if length is None else length,
            sha256=sha256,
            md5=_hexadecimal(md5_base64),
            validator=headers.get("Last-Modified") if etag.startswith("W/") else etag,  # weak ones do not promise equal bytes
        )

    def _check_promises(self, answer: Response) -> None:
        """Find before anything is fetched that it is the wrong thing, or that its end could not be told."""
        remote = self.remote
        if self.size is not None and remote.size not in (None, self.size):
            raise self._wrong(f"it has {remote.size:,} bytes, but {self.size:,} were expected")
        for name, checksum in self.known.items():
            if (published := getattr(remote, name)) not in (None, checksum):
                raise self._wrong(f"its {name} is {published}, but {checksum} was expected")
        ends = answer.headers.get("Transfer-Encoding") == "chunked"
        if not (ends or self.known or remote.sha256 or remote.md5) and self.expected is None:
            raise UserError(
                f"{self.url}: the server does not say how long the file is, so a part of it could be taken for the whole; "
                f"fetch it yourself as {self.path}"
            )

    def _finish(self) -> None:
        size = self.have
        if size > 1e9:
            self.progress.say(f"{self.path.name}: all has come, computing its checksum")
        published = {name: getattr(self.remote, name) for name in ("sha256", "md5")}
        wanted = {name: checksum for name, checksum in published.items() if checksum} | self.known
        found = digest(self.partial, {"sha256", *wanted})
        for name, checksum in wanted.items():
            if checksum != found[name]:
                raise self._wrong(f"its {name} is {found[name]}, but it should be {checksum}")
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        write_json(beside(self.path, "origin.json"), {"url": self.url, "size": size, **found})
        move(self.partial, self.path)
        self.state.unlink(missing_ok=True)
        self.progress.end(size)

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)
        self.remote = None

    def _anew(self, why: str) -> _Trouble:
        self._discard()
        return _Trouble(f"{why}, so it starts anew")

    def _wrong(self, what: str) -> UserError:
        self._discard()
        return UserError(f"{self.url} is not what it should be: {what}; what came was removed; try again, or another source")

    def _so_far(self) -> str:
        return f"{self.have:,} bytes" if self.expected is None else f"{self.have:,} of {self.expected:,} bytes"


def _is_there(path: Path, known: dict[str, str], size: int | None) -> bool:
    if not path.is_file():
        return False
    found = path.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path} has {found:,} bytes, but {size:,} were expected; remove it to fetch it anew")
    origin = read_origin(path) or {}
    computed = {name: origin[name] for name in known if name in origin and origin.get("size") == found}
    if unknown := known.keys() - computed.keys():
        computed |= digest(path, unknown)
    for name, checksum in known.items():
        if computed[name] != checksum:
            raise UserError(f"{path} has the {name} {computed[name]}, but {checksum} was expected; remove it to fetch it anew")
    return True


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"{path}: {byte_count(needed)} are still to come, but its disk has {byte_count(free)} free; make room or take "
            "another disk"
        )


def _hexadecimal(base64_text: str) -> str | None:
    """An md5 that was sent in base64; None where it is none."""
    try:
        digest = base64.b64decode(base64_text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return digest.hex() if len(digest) == hashlib.md5(usedforsecurity=False).digest_size else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
