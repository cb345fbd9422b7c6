"""TensorBoard's files, read back by TFRecord's framing and checksums."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from blip2x.engine.loggers.tensorboard import build

RUN = {"task": {"kind": "caption"}, "optim": {"lr": 0.1}, "url": "https://ann:pass@host"}


def start(folder, cfg, *, goes_on=False):
    return build(cfg, folder=folder, config=RUN, goes_on=goes_on, say=pytest.fail)


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> list[Event]:
    content, found = path.read_bytes(), []
    while content:
        length, check = struct.unpack_from("<QI", content)
        data = content[12 : 12 + length]
        assert check == masked(content[:8]) and struct.unpack_from("<I", content, 12 + length) == (masked(data),)
        found.append(Event.FromString(data))
        content = content[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def shown(folder: Path) -> list[Event]:
    """What TensorBoard shows of a folder: files in the order of their names, each start hides what is behind it."""
    kept: list[Event] = []
    for path in sorted(folder.glob("events.*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                kept = [old for old in kept if old.step < event.step]
            else:
                kept.append(event)
    return kept


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    return [(v.tag, e.step, v.simple_value) for e in shown(folder) for v in e.summary.value if v.HasField("simple_value")]


def write_line(folder, stage, step, **metrics):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")


def test_each_stage_counts_its_own_steps_in_its_own_folder_at_once_on_the_disk(tmp_path, config):
    logger = start(tmp_path, config("tensorboard"))
    logger.log("a", 5, {"loss": 2.0, "recall@1": 0.5})
    logger.log("b", 1, {"accuracy/spatial colour": 1.0})
    assert scalars(tmp_path / "tensorboard/a") == [("a/loss", 5, 2.0), ("a/recall@1", 5, 0.5)]
    assert scalars(tmp_path / "tensorboard/b") == [("b/accuracy/spatial colour", 1, 1.0)]
    logger.close(failed=False)


def test_config_and_results_are_there_to_compare_runs_by_and_nothing_secret(tmp_path, config):
    logger = start(tmp_path, config("tensorboard"))
    logger.finish({"caption": {"CIDEr": 1.5}, "seconds": 2})
    logger.close(failed=False)
    values = {value.tag: value for event in shown(tmp_path / "tensorboard") for value in event.summary.value}
    assert "lr: 0.1" in values["config/text_summary"].tensor.string_val[0].decode()
    assert values["results/caption/CIDEr"].simple_value == 1.5 and values["results/seconds"].simple_value == 2
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events.*"))
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(values) and b"optim/lr" in content
    assert b"git_commit" in content and b"https://***@host" in content and b"pass" not in content


def test_predictions_are_a_table_of_texts_and_pictures(tmp_path, config, rows):
    logger = start(tmp_path, config("tensorboard", "rows=1"))
    logger.table("caption", 7, "predictions", *rows)
    logger.close(failed=False)
    values = {value.tag: value for event in shown(tmp_path / "tensorboard/caption") for value in event.summary.value}
    text = values["caption/predictions/text_summary"].tensor.string_val[0].decode()
    assert text == "| row | caption | scores/CIDEr |\n| --- | --- | --- |\n| 000 | a red \\| wall | 1.5 |"
    picture = values["caption/predictions/000 image"].image
    assert (picture.width, picture.height) == Image.open(io.BytesIO(picture.encoded_image_string)).size == (320, 160)
    assert "caption/predictions/000 attention" in values and len(values) == 3


def test_no_rows_no_tables(tmp_path, config, rows):
    logger = start(tmp_path, config("tensorboard", "rows=0"))
    logger.table("caption", 7, "predictions", *rows)
    logger.close(failed=False)
    assert not (tmp_path / "tensorboard/caption").exists()


def test_a_run_that_goes_on_hides_what_came_behind_its_checkpoint(tmp_path, config):
    first = start(tmp_path, config("tensorboard"))
    for step in (2, 4, 6):
        first.log("a", step, {"loss": float(step)})
    first.log("b", 9, {"loss": 9.0})
    del first  # killed; the checkpoint was of step 4, whose line stays, and whose validation comes again
    write_line(tmp_path, "a", 2, loss=2.0)
    write_line(tmp_path, "a", 4, loss=4.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "a", "st\n')  # a line that was not finished
    write_line(tmp_path, "b", 9, loss=9.0)
    second = start(tmp_path, config("tensorboard"), goes_on=True)
    for step, metrics in ((4, {"CIDEr": 1.0}), (6, {"loss": 0.5})):
        write_line(tmp_path, "a", step, **metrics)
        second.log("a", step, metrics)
    second.close(failed=False)
    stage = tmp_path / "tensorboard/a"
    assert scalars(stage) == [("a/loss", 2, 2.0), ("a/loss", 4, 4.0), ("a/CIDEr", 4, 1.0), ("a/loss", 6, 0.5)]
    assert scalars(tmp_path / "tensorboard/b") == [("b/loss", 9, 9.0)]
    texts = [v.tag for e in shown(tmp_path / "tensorboard") for v in e.summary.value]
    assert texts == ["config/text_summary"]


def test_predictions_made_anew_keep_the_last_step_of_the_training(tmp_path, config, rows):
    first = start(tmp_path, config("tensorboard"))
    first.log("caption", 4, {"loss": 4.0})
    first.table("caption", 4, "predictions", *rows)
    write_line(tmp_path, "caption", 4, loss=4.0)
    second = start(tmp_path, config("tensorboard"), goes_on=True)
    second.table("caption", 4, "predictions", *rows)
    second.close(failed=False)
    tags = [value.tag for event in shown(tmp_path / "tensorboard/caption") for value in event.summary.value]
    assert tags.count("caption/loss") == tags.count("caption/predictions/text_summary") == 1


def test_a_full_disk_is_said_and_does_not_block(tmp_path, config, monkeypatch):
    logger = start(tmp_path, config("tensorboard"))
    logger.log("a", 1, {"loss": 1.0})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        logger.log("a", 2, {"loss": 1.0})
