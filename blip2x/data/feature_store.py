"""What a frozen image encoder gives of pictures, kept on disk for all processes and runs that want it.

A folder has shards, each of them two files that one process makes and only ever appends to: ``NAME.rows``, the numbers of one
picture after the other, and ``NAME.index``, a record of fixed size for each. A record is written when its row is, and both have
a checksum. So nobody needs a lock, and whatever a killed process, a full disk or a bad one leaves behind is seen when it is
read: it counts as not there. A row is added only where no other process has added it by then; of two that do so within the same
milliseconds both stay, which does no harm.

N records, M rows, P patches, D width of the image encoder.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

IDENTITY_BYTES = 16
DTYPE = np.dtype("<f2")
MANIFEST_FILE = "manifest.json"  # in words, what the folder's key is made of

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8"), ("crc", "<u4"), ("check", "<u4")])
_MIXERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)  # odd, so that no bit is lost
_SHARD_BYTES = 4 * 2**30  # behind which a process begins a new one
LEAST_SPARE = 2**30  # bytes of the disk that are left alone at least
_SECONDS_BETWEEN_LOOKS = 5.0  # for what other processes have written meanwhile
_SECONDS_LATE = 60.0  # that a network's file system may show a file as it was, by default (NFS: acregmax)


def identity_of(*parts: str) -> bytes:
    """16 bytes that stand for these words: the identity of a row, or of a picture."""
    return blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=IDENTITY_BYTES).digest()


class Found(NamedTuple):
    """A row [P, D], read-only and still on disk; None: there is none, or (`damaged`) only such as fail their checksum."""

    row_PD: np.ndarray | None
    damaged: bool


class _Table(NamedTuple):
    """Records in the order of `high_N`; of those with equal ones, the newest comes last."""

    high_N: np.ndarray
    record_N: np.ndarray
    shard_N: np.ndarray  # number of the shard

    @classmethod
    def of(cls, record_N: np.ndarray, shard_N: np.ndarray) -> _Table:
        order_N = np.argsort(record_N["high"], kind="stable")
        record_N = record_N[order_N]
        return cls(np.ascontiguousarray(record_N["high"]), record_N, shard_N[order_N])


@dataclass
class _Shard:
    """The files of one process."""

    stem: Path
    records: int = 0  # that were read of its index
    bytes: int = 0  # of its rows, when that was
    rows: np.ndarray | None = None  # mapped

    @property
    def rows_path(self) -> Path:
        return self.stem.with_suffix(".rows")

    @property
    def index_path(self) -> Path:
        return self.stem.with_suffix(".index")


class FeatureStore:
    """The rows in one folder, all of one shape; the folder is made when the first row is added.

    Attributes:
        shape: of a row, (P, D).
        broken: records that were left out so far, since they or their rows are not whole.
        stopped: why nothing is added any more; None: all that is given is.
        spare: gives how many bytes of the disk are left to checkpoints.

    Args:
        folder: whose name is a key of all that the numbers depend on.
        shape: of a row.
        manifest: the same in words, written beside the rows.
        limit_bytes: rows are added only as far as those in the folder take no more; None: as far as the disk goes.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], manifest: dict[str, Any], limit_bytes: float | None = None):
        self.folder, self.shape, self.broken = folder, shape, 0
        self.stopped: str | None = None
        self.spare: Callable[[], float] = lambda: LEAST_SPARE
        self._manifest, self._limit_bytes = manifest, limit_bytes
        self._row_bytes = DTYPE.itemsize * shape[0] * shape[1]
        self._shards: list[_Shard] = []
        self._by_name: dict[str, int] = {}
        self._tables: list[_Table] = []  # from large and old to small and new
        self._own: tuple[int, BinaryIO, BinaryIO] | None = None  # number of the shard that is written, its rows, its index
        self._bytes = 0
        self._looked = 0.0
        self.refresh()

    def __len__(self) -> int:
        """How many rows are known; what was kept twice counts twice."""
        return sum(len(table.high_N) for table in self._tables)

    @property
    def bytes(self) -> int:
        """What all files of rows take."""
        return self._bytes

    def refresh(self) -> None:
        """Read what has been written since the last time, by whichever process."""
        self._looked, found, numbers, self._bytes = time.monotonic(), [], [], 0
        for path in self._indexes():
            if path.stem not in self._by_name:
                self._by_name[path.stem] = len(self._shards)
                self._shards.append(_Shard(path.with_suffix("")))
            number = self._by_name[path.stem]
            record_N = self._news(self._shards[number])
            found.append(record_N)
            numbers.append(np.full(len(record_N), number, dtype=np.uint32))
            self._bytes += self._shards[number].bytes
        if any(map(len, found)):
            self._keep(np.concatenate(found), np.concatenate(numbers))

    def look(self, identity: bytes) -> Found:
        """The row of that identity, if there is a whole one."""
        found = self._look(identity)
        if found.row_PD is None and time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self.refresh()
            found = self._look(identity)
        return found

    def knows(self, identity: bytes) -> bool:
        """Whether there is a row of that identity, which is not looked at: it may be damaged."""
        return any(True for _ in self._records(identity))

    def add(self, identity_MI: np.ndarray, row_MPD: np.ndarray, *, reserved: float = 0.0) -> bool:
        """Keep rows [M, P, D] float16 under identities [M, 16] uint8, or say in `stopped` why nothing can be kept any more.

        Those are left out that another process has added meanwhile: runs in step would keep all of them once each. False: they
        are not kept since others need the room, of which so many bytes are `reserved` to them.
        """
        if self.stopped:
            return True
        self.refresh()
        lacking = [place for place, each in enumerate(identity_MI) if self._look(each.tobytes()).row_PD is None]
        if not lacking:
            return True
        if len(lacking) < len(row_MPD):
            identity_MI, row_MPD = identity_MI[lacking], row_MPD[lacking]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            full = self._full(row_MPD.nbytes)
            if full:
                self._stop(full)
            elif reserved and self._full(row_MPD.nbytes + reserved):
                return False
            else:
                self._append(identity_MI, row_MPD)
        except OSError as error:
            self._stop(f"it cannot be written: {error.strerror or error}")
        return True

    def _full(self, wanted: float) -> str | None:
        """Why there is no room for so many bytes."""
        if self._limit_bytes is not None and self._bytes + wanted > self._limit_bytes:
            return f"it has {self._bytes / 1e9:.3g} GB, and dataset.cache_gb allows {self._limit_bytes / 1e9:.3g} GB"
        free, spare = shutil.disk_usage(self.folder).free, self.spare()
        if free - wanted < spare:
            return f"its disk has {free / 1e9:.3g} GB free, of which {spare / 1e9:.3g} GB are left to checkpoints"
        return None

    def _indexes(self) -> list[Path]:
        try:
            return sorted(self.folder.glob("*.index"))
        except OSError:  # as if nothing were there
            return []

    def _news(self, shard: _Shard) -> np.ndarray:
        """The records that were not read before, those left out that are not whole.

        Two files of a network's file system may be seen in states of different times: from a record on whose row is not there
        yet, all are left to the next time.
        """
        try:
            index = shard.index_path.stat()
            count = index.st_size // _RECORD.itemsize - shard.records
            if count <= 0:
                return np.empty(0, _RECORD)
            rows = shard.rows_path.stat().st_size  # after the index: a record follows its row
            record_N = np.fromfile(shard.index_path, _RECORD, count=count, offset=shard.records * _RECORD.itemsize)
        except OSError:  # deleted meanwhile
            shard.bytes = 0
            return np.empty(0, _RECORD)
        shard.bytes = rows
        whole_N = _check(record_N) == record_N["check"]
        late_N = whole_N & (record_N["row"] >= rows // self._row_bytes)
        if late_N.any() and time.time() - index.st_mtime < _SECONDS_LATE:  # their rows are written, but not to be seen yet
            first = int(late_N.argmax())
            record_N, whole_N, late_N = record_N[:first], whole_N[:first], late_N[:first]
        shard.records += len(record_N)
        self.broken += int((~whole_N | late_N).sum())
        return record_N[whole_N & ~late_N]

    def _keep(self, record_N: np.ndarray, shard_N: np.ndarray) -> None:
        """Tables are merged as they grow, each at least twice as long as the next: few to look in, and little to sort anew."""
        self._tables.append(_Table.of(record_N, shard_N))
        while len(self._tables) > 1 and len(self._tables[-2].high_N) < 2 * len(self._tables[-1].high_N):
            newer, older = self._tables.pop(), self._tables.pop()
            records = np.concatenate([older.record_N, newer.record_N])
            self._tables.append(_Table.of(records, np.concatenate([older.shard_N, newer.shard_N])))

    def _look(self, identity: bytes) -> Found:
        known = False
        for shard, record in self._records(identity):
            known = True
            row_PD = self._read(shard, int(record["row"]))
            if row_PD is not None and zlib.crc32(row_PD) == record["crc"]:
                return Found(row_PD, damaged=False)
        return Found(None, damaged=known)

    def _records(self, identity: bytes) -> Iterator[tuple[_Shard, np.void]]:
        """Those of an identity, from new to old."""
        high, low = np.frombuffer(identity, "<u8")
        for table in reversed(self._tables):
            place = int(table.high_N.searchsorted(high, side="right")) - 1
            while place >= 0 and table.high_N[place] == high:
                record = table.record_N[place]
                if record["low"] == low:
                    yield self._shards[table.shard_N[place]], record
                place -= 1

    def _read(self, shard: _Shard, row: int) -> np.ndarray | None:
        try:
            count = shard.rows_path.stat().st_size // self._row_bytes
            if row >= count:  # reading behind the end of a mapped file would end the process
                return None
            if shard.rows is None or row >= len(shard.rows):
                shard.rows = np.asarray(np.memmap(shard.rows_path, DTYPE, "r", shape=(count, *self.shape)))
            return shard.rows[row]
        except (OSError, ValueError):  # it is gone
            return None

    def _append(self, identity_MI: np.ndarray, row_MPD: np.ndarray) -> None:
        row_MPD = np.ascontiguousarray(row_MPD, DTYPE)
        number, rows, index = self._own or self._begin()
        record_M = np.empty(len(row_MPD), _RECORD)
        record_M["high"], record_M["low"] = np.ascontiguousarray(identity_MI).view("<u8").T
        record_M["row"] = np.arange(len(row_MPD)) + rows.tell() // self._row_bytes
        record_M["crc"] = [zlib.crc32(row_PD) for row_PD in row_MPD]
        record_M["check"] = _check(record_M)
        _write(rows, row_MPD.data.cast("B"))
        _write(index, record_M.tobytes())  # of the whole batch at once: a resumed run finds all of it or encodes it as it was
        self._bytes += row_MPD.nbytes
        self._shards[number].bytes += row_MPD.nbytes
        self._shards[number].records += len(record_M)
        self._keep(record_M, np.full(len(record_M), number, dtype=np.uint32))
        if rows.tell() >= _SHARD_BYTES:
            self._close()

    def _begin(self) -> tuple[int, BinaryIO, BinaryIO]:
        self._write_manifest()
        shard = _Shard(self.folder / f"{time.time_ns():x}-{os.getpid()}-{secrets.token_hex(4)}")
        rows = shard.rows_path.open("xb", buffering=0)
        index = shard.index_path.open("xb", buffering=0)
        self._by_name[shard.stem.name] = len(self._shards)
        self._own = len(self._shards), rows, index
        self._shards.append(shard)
        return self._own

    def _write_manifest(self) -> None:
        """For whoever looks into the folder; rows are kept without it, too: the key is what tells whether they serve."""
        path = self.folder / MANIFEST_FILE
        text = json.dumps(self._manifest, indent=2) + "\n"
        with suppress(OSError):
            if not path.is_file() or path.read_bytes() != text.encode():
                # on a disk that machines share, several processes have one number
                partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
                partial.write_text(text, encoding="utf-8")
                partial.replace(path)

    def _stop(self, why: str) -> None:
        self.stopped = why
        self._close()

    def _close(self) -> None:
        if self._own:
            for file in self._own[1:]:
                with suppress(OSError):  # its rows have checksums
                    file.close()
        self._own = None


def _check(record_N: np.ndarray) -> np.ndarray:
    """Each record's checksum [N] uint32."""
    mixed_N = np.full(len(record_N), 1, dtype=np.uint64)
    for name, mixer in zip(("high", "low", "row", "crc"), _MIXERS, strict=True):
        mixed_N = (mixed_N ^ record_N[name].astype(np.uint64)) * np.uint64(mixer)
        mixed_N ^= mixed_N >> np.uint64(29)
    return (mixed_N >> np.uint64(32)).astype(np.uint32)


def _write(file: BinaryIO, data: Any) -> None:
    """All of it, or back to where it was."""
    start, rest = file.tell(), memoryview(data)
    try:
        while rest:
            written = file.write(rest)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = rest[written:]
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise
