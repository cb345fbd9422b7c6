"""What the W&B client has written to a folder, read back: its transaction log is LevelDB's log format with protobuf inside."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32768
_PART = struct.Struct("<IHB")  # checksum, length, type: 1 whole, 2 first, 3 middle, 4 last


@dataclass
class Written:
    """The content of one .wandb file."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read(path: Path) -> Written:
    """The records of the file."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = Written()
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.history.append({key: value for key, value in line.items() if not key.startswith("_")})
        elif kind == "summary":
            found.summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _records(content: bytes) -> Iterator[bytes]:
    assert content.startswith(_HEADER), content[:8]
    place, parts = len(_HEADER), b""
    while place + _PART.size <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _PART.size:
            place += left
            continue
        _, length, kind = _PART.unpack_from(content, place)
        if not kind:  # a block's rest that was left empty
            place += left
            continue
        parts += content[place + _PART.size : place + _PART.size + length]
        place += _PART.size + length
        if kind in (1, 4):
            yield parts
            parts = b""
