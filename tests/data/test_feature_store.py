"""Rows of features on disk: found by all who open the folder, and never taken where they are not whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from blip2x.data import feature_store
from blip2x.data.feature_store import FeatureStore, identity_of

SHAPE = (3, 4)


def names(*numbers: int) -> np.ndarray:
    return np.frombuffer(b"".join(identity_of(str(number)) for number in numbers), np.uint8).reshape(len(numbers), -1)


def rows(*numbers: int) -> np.ndarray:
    return np.stack([np.full(SHAPE, number, np.float16) for number in numbers])


@pytest.fixture
def store(tmp_path):
    """`store()` opens the folder."""
    return lambda limit=None: FeatureStore(tmp_path / "rows", SHAPE, {"weights": "w"}, limit)


@pytest.fixture
def filled(store) -> FeatureStore:
    made = store()
    made.add(names(1, 2, 3), rows(1, 2, 3))
    return made


def found(store: FeatureStore, number: int) -> np.ndarray | None:
    return store.look(identity_of(str(number))).row_PD


def file(store: FeatureStore, kind: str) -> Path:
    (path,) = store.folder.glob(f"*.{kind}")
    return path


def test_rows_are_found_where_they_were_added_and_where_the_folder_is_opened_later(store, filled):
    for each in (filled, store()):
        assert len(each) == 3 and each.bytes == 3 * 24 and each.broken == 0
        assert all(np.array_equal(found(each, number), rows(number)[0]) for number in (1, 2, 3))
        assert each.look(identity_of("4")) == (None, False)
    assert (filled.folder / "manifest.json").read_text() == '{\n  "weights": "w"\n}\n'


def test_a_folder_that_nobody_added_to_is_not_made(store):
    assert len(store()) == 0 and not store().folder.exists()


def test_many_small_batches_are_found_in_few_tables(store):
    made = store()
    for number in range(0, 400, 2):
        made.add(names(number, number + 1), rows(number, number + 1))
    assert len(made._tables) < 10 and len(made) == 400
    assert all(found(each, number)[0, 0] == number for each in (made, store()) for number in range(400))


def test_two_that_write_see_each_other_and_keep_the_same_once(store, monkeypatch):
    monkeypatch.setattr(feature_store, "_SECONDS_BETWEEN_LOOKS", 0.0)
    one, two = store(), store()
    one.add(names(1, 2), rows(1, 2))
    two.add(names(2, 3), rows(2, 3))
    assert found(one, 3)[0, 0] == 3 and found(two, 1)[0, 0] == 1  # without being told to look
    assert len(list(one.folder.glob("*.rows"))) == 2 and len(store()) == 3


def test_two_in_step_keep_what_they_made_at_the_same_time_once(store):
    one, two = store(), store(limit=4 * 24)
    for numbers in ((1, 2), (3, 4)):
        one.add(names(*numbers), rows(*numbers))
        two.add(names(*numbers), rows(*numbers))
    assert len(one) == len(two) == len(store()) == 4 and two.bytes == 4 * 24 and two.stopped is None
    two.add(names(4, 5), rows(4, 5))
    assert "dataset.cache_gb" in two.stopped and two.knows(identity_of("4")) and not two.knows(identity_of("5"))


def test_rows_are_kept_where_the_words_about_them_cannot_be_written(store):
    made = store()
    (made.folder / "manifest.json").mkdir(parents=True)
    made.add(names(1), rows(1))
    assert made.stopped is None and found(store(), 1)[0, 0] == 1


def test_a_file_that_cannot_be_closed_stops_nothing(store, monkeypatch):
    """As a network's file system may say only then that it is full."""
    monkeypatch.setattr(feature_store, "_SHARD_BYTES", 1)
    made = store()

    class Unclosed:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def close(self):
            self._file.close()
            raise OSError(28, "No space left on device")

    begin = made._begin

    def begin_unclosed():
        number, *files = begin()
        made._own = (number, *map(Unclosed, files))
        return made._own

    monkeypatch.setattr(made, "_begin", begin_unclosed)
    for number in (1, 2):
        made.add(names(number), rows(number))
    assert made.stopped is None and found(made, 1)[0, 0] == 1 and len(store()) == 2


def test_a_large_shard_is_followed_by_another(store, monkeypatch):
    monkeypatch.setattr(feature_store, "_SHARD_BYTES", 48)
    made = store()
    for number in range(5):
        made.add(names(number), rows(number))
    assert len(list(made.folder.glob("*.rows"))) == 3
    assert all(found(store(), number)[0, 0] == number for number in range(5))


def test_a_row_whose_bytes_changed_is_damaged_and_the_one_added_after_it_counts(store, filled):
    data = bytearray(file(filled, "rows").read_bytes())
    data[24 + 5] ^= 1
    file(filled, "rows").write_bytes(data)
    opened = store()
    assert opened.look(identity_of("2")) == (None, True) and found(opened, 1)[0, 0] == 1
    opened.add(names(2), rows(2))
    assert found(opened, 2)[0, 0] == found(store(), 2)[0, 0] == 2


@pytest.mark.parametrize("field", [0, 8, 16, 20, 24, 28])
def test_a_record_whose_bytes_changed_is_left_out(store, filled, field):
    data = bytearray(file(filled, "index").read_bytes())
    data[32 + field] ^= 1
    file(filled, "index").write_bytes(data)
    opened = store()
    assert opened.broken == 1 and len(opened) == 2
    assert found(opened, 2) is None and found(opened, 1)[0, 0] == 1 and found(opened, 3)[0, 0] == 3


@pytest.mark.parametrize(("kind", "cut", "broken"), [("index", 5, 0), ("rows", 1, 1), ("rows", 25, 2), ("rows", 72, 3)])
def test_a_file_that_was_cut_off_counts_as_far_as_it_is_whole(store, filled, kind, cut, broken):
    os.truncate(file(filled, kind), file(filled, kind).stat().st_size - cut)
    os.utime(file(filled, "index"), (0, 0))  # long ago, so that nothing is on its way
    opened, lost = store(), max(1, -(-cut // 24) if kind == "rows" else 1)
    assert (len(opened), opened.broken) == (3 - lost, broken)
    assert [found(opened, number) is None for number in (1, 2, 3)] == [place >= 3 - lost for place in range(3)]


@pytest.mark.parametrize("cut", [1, 25, 72])
def test_records_that_are_seen_before_their_rows_are_read_again(store, filled, cut):
    """As on a network's file system, which may show an index as it is and its rows as they were."""
    data = file(filled, "rows").read_bytes()
    file(filled, "rows").write_bytes(data[:-cut])
    opened = store()
    assert (len(opened), opened.broken) == ((len(data) - cut) // 24, 0)
    file(filled, "rows").write_bytes(data)
    opened.refresh()
    assert (len(opened), opened.broken) == (3, 0) and [found(opened, number)[0, 0] for number in (1, 2, 3)] == [1, 2, 3]


def test_rows_that_are_cut_off_or_deleted_while_the_folder_is_open_are_damaged(filled):
    assert found(filled, 3) is not None
    os.truncate(file(filled, "rows"), 50)
    assert filled.look(identity_of("3")) == (None, True)
    file(filled, "rows").unlink()
    assert filled.look(identity_of("1")) == (None, True)


def test_records_of_a_deleted_index_are_not_read_again_and_again(store, filled):
    file(filled, "index").unlink()
    filled.refresh()
    assert found(filled, 1)[0, 0] == 1 and len(store()) == 0


def test_nothing_is_added_beyond_the_limit(store):
    made = store(limit=60)
    made.add(names(1, 2), rows(1, 2))
    assert made.stopped is None
    made.add(names(3), rows(3))
    assert "dataset.cache_gb" in made.stopped and found(made, 3) is None and found(made, 2)[0, 0] == 2
    assert len(store()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs /dev/full")
def test_a_full_disk_ends_the_writing_and_leaves_whole_rows(store, filled):
    number, data, index = filled._own
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  # the store closes it
    filled._own = (number, data, full)  # so that the row is written, and its record is not
    filled.add(names(4), rows(4))
    assert "No space left" in filled.stopped and found(filled, 4) is None and found(filled, 3)[0, 0] == 3
    assert len(store()) == 3 and store().broken == 0
    index.close()


@pytest.mark.parametrize(("free", "spare"), [(2**30, None), (4 * 2**30, 4 * 2**30)])
def test_the_room_that_checkpoints_need_is_left_to_them(store, monkeypatch, free, spare):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - free, free)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage)
    made = store()
    if spare:
        made.spare = lambda: spare
    made.add(names(1), rows(1))
    said = f"its disk has {free / 1e9:.3g} GB free, of which {free / 1e9:.3g} GB are left to checkpoints"
    assert made.stopped == said and len(store()) == 0


def test_room_that_others_need_is_left_to_them_and_stops_nothing(store):
    made = store(limit=4 * 24)
    assert made.add(names(1), rows(1)) and not made.add(names(2, 3), rows(2, 3), reserved=2 * 24)
    assert made.stopped is None and len(made) == 1
    assert made.add(names(2), rows(2), reserved=2 * 24) and made.add(names(3, 4), rows(3, 4)) and len(store()) == 4


def test_a_process_that_is_killed_while_it_writes_leaves_what_it_had_written(store, tmp_path):
    code = f"""
import sys, numpy as np
from pathlib import Path
from blip2x.data.feature_store import FeatureStore, identity_of
store, number = FeatureStore(Path({str(tmp_path / "rows")!r}), {SHAPE}, {{}}), 0
while True:
    store.add(np.frombuffer(identity_of(str(number)), np.uint8)[None], np.full((1, *{SHAPE}), number % 2000, np.float16))
    number += 1
    if number == 50:
        print(flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    opened = store()
    assert len(opened) >= 50
    assert all(found(opened, number)[0, 0] == number % 2000 for number in range(len(opened)))
