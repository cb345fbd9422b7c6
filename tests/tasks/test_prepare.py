from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from blip2x.config.compose import CONF_FOLDER, compose_config
from blip2x.errors import Interrupted, UserError
from blip2x.tasks.prepare import Plan, Prepare
from tests.data import layouts
from tests.web_server import PIECE, serve

DATASETS = sorted(path.stem for path in (CONF_FOLDER / "dataset").glob("*.yaml") if path.stem not in ("custom", "digits"))
KARPATHY = ["karpathy_train", "karpathy_val", "karpathy_test"]
BY_HAND = {"flickr30k", "cc3m", "laion", "coco_vg_ccs_laion"}


@pytest.fixture
def web(monkeypatch):
    with serve(monkeypatch) as server:
        monkeypatch.setattr("blip2x.transfer.linked_picture.WAITS", (0,))
        yield server


@functools.cache
def composed(name):
    return compose_config([f"dataset={name}", "task=prepare", "paths.data=data", "task.links.connections=2"])


@pytest.fixture
def config(web, tmp_path, monkeypatch):
    """`config(name, option=value)`: of a tiny data set that is served, in `tmp_path`/data; options are the task's."""
    monkeypatch.chdir(tmp_path)
    return lambda name, **options: with_options(layouts.publish(copy.deepcopy(composed(name)), web), **options)


def with_options(cfg, **options):
    for name, value in options.items():
        assert hasattr(cfg.task, name)
        setattr(cfg.task, name, value)
    return cfg


def offline(cfg):
    cfg.paths.offline = True
    return cfg


@pytest.fixture
def prepare(run):
    """`prepare(cfg)`: what the task gives."""

    def call(cfg):
        Prepare.check(cfg)
        return Prepare(cfg, run).run()

    return call


@pytest.fixture
def said(run):
    """What it printed."""
    return run.console.file.getvalue


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", DATASETS)
def test_the_layout_is_on_the_disk_and_the_second_run_fetches_nothing(name, config, prepare, said, web, tmp_path):
    cfg = config(name)
    if name in BY_HAND:
        layouts.put_by_hand(cfg, web)
    result = prepare(cfg)
    assert result.metrics["things"] > 0 and result.metrics["fetched"] > 0
    for part in cfg.dataset.parts.values():
        assert all(path.is_file() for path in layouts.annotation_files(part))
        for files in part.splits.values():  # read without the readers: the paths that they give lead to files
            assert all(os.path.isfile(os.path.join(part.images, image)) for image in images_of(part, files))
    assert not [
        path for path in files_below(tmp_path / "data") if "partial" in path or "unpacking" in path or path.endswith(".new")
    ]
    lines = said().splitlines()
    parts = [part for part in cfg.dataset.parts if cfg.dataset.parts[part].licence]
    assert [line.split(":")[0] for line in lines[: len(parts)]] == [f"licence of {part}" for part in parts]
    assert re.fullmatch(f"next: python runners/run.py task=.* dataset={name}", lines[-1])
    counted = Counter(web.paths())
    missing = {path for path in counted if path not in web.files}
    assert all(number == 1 for path, number in counted.items() if path not in missing), counted
    web.asked.clear()
    assert prepare(cfg).metrics["fetched"] == 0 and web.asked == []
    prepare(with_options(cfg, verify=True))
    prepare(with_options(cfg, verify=False, images=False))
    assert web.asked == []


def images_of(part, files):
    path = files.captions or files.questions
    if part.format == "shards":
        return [path.replace("*", "00000")]
    with open(path, encoding="utf-8") as file:
        content = [json.loads(line) for line in file] if path.endswith(".jsonl") else json.load(file)
    if part.format == "entries":
        return [row["image"] for row in content]
    if part.format == "coco":
        return [row["file_name"] for row in content["images"]]
    if part.format == "gqa":
        return [f"{row['imageId']}.jpg" for row in content.values()]
    assert part.format == "vqa"
    return [files.image.format(row["image_id"]) for row in content["questions"]]


def test_coco_ends_where_everything_else_looks_for_it(config, prepare, tmp_path):
    prepare(config("coco"))
    assert files_below(tmp_path / "data") == [
        ".blip2x-prepared.json",
        "coco/.train2014.zip.origin.json",
        "coco/.val2014.zip.origin.json",
        *(f"coco/annotations/.coco_karpathy_{split}.json.origin.json" for split in ("test", "train", "val")),
        *(f"coco/annotations/coco_karpathy_{split}.json" for split in ("test", "train", "val")),
        *(f"coco/images/{layouts.coco_name('train2014', number)}" for number in layouts.TRAIN),
        *(f"coco/images/{layouts.coco_name('val2014', number)}" for number in layouts.VAL),
        "coco/train2014.zip",
        "coco/val2014.zip",
    ]


def test_archives_can_be_removed_and_images_left_out(config, prepare, web, tmp_path):
    prepare(config("coco", keep_archives=False, skip=["val2014"]))
    assert not list((tmp_path / "data/coco").glob("*.zip")) and not (tmp_path / "data/coco/images/val2014").exists()
    web.asked.clear()
    prepare(config("coco", keep_archives=False, skip=["val2014"]))
    assert web.asked == []
    prepare(config("gqa", images=False))
    assert not (tmp_path / "data/gqa/images").exists() and "/gqa/images.zip" not in web.paths()
    assert (tmp_path / "data/gqa/annotations/testdev_balanced_questions.json").is_file()
    assert not (tmp_path / "data/gqa/annotations/train_all_questions").exists()  # an archive's other members are left in it


def test_data_sets_share_files(config, prepare, web):
    prepare(config("coco"))
    web.asked.clear()
    prepare(config("okvqa"))
    assert web.paths() and all(path.startswith("/okvqa/") for path in web.paths())


def test_a_failure_of_one_file_does_not_lose_the_others(config, prepare, said, web, tmp_path):
    cfg = config("coco")
    web.files["/coco/val2014.zip"].status = 404
    with pytest.raises(UserError, match=r"coco is not complete:\n  val2014: .*/coco/val2014.zip does not exist") as error:
        prepare(cfg)
    assert "train2014" not in str(error.value) and (tmp_path / "data/coco/images/train2014").is_dir()
    assert "failed" in said()
    web.files["/coco/val2014.zip"].status = 200
    web.asked.clear()
    prepare(cfg)
    assert web.paths() == ["/coco/val2014.zip"]


def test_a_wrong_checksum_is_not_taken(config, prepare, web, tmp_path):
    cfg = config("coco")
    content = web.files["/coco/annotations/x"] = web.files["/annotations/coco_karpathy_val.json"]
    content.content = content.content.replace(b"plain", b"plane")
    with pytest.raises(UserError, match=r"karpathy_val: .* its md5 is \w+, but it should be \w+"):
        prepare(cfg)
    assert not (tmp_path / "data/coco/annotations/coco_karpathy_val.json").exists()


def test_the_checksum_that_was_seen_first_is_kept(config, prepare, web, tmp_path):
    cfg = config("vg", images=False)
    prepare(cfg)
    path = tmp_path / "data/vg/annotations/vg_caption.json"
    path.unlink()
    (path.parent / f".{path.name}.origin.json").unlink()
    file = web.files["/annotations/vg_caption.json"]
    before, file.content = file.content, file.content.replace(b"wall", b"hall")
    with pytest.raises(
        UserError, match=r"fetched first: if its owner has changed it since, remove it from .*blip2x-prepared.json"
    ):
        prepare(cfg)
    assert not path.exists()
    file.content = before
    prepare(cfg)


def test_a_cut_connection_is_continued_by_the_next_run(config, prepare, web, monkeypatch):
    cfg = config("coco")
    whole = web.files["/coco/train2014.zip"]
    whole.content = layouts.zipped({layouts.coco_name("train2014", at): random.randbytes(PIECE) for at in (9, 25)})
    file = cfg.dataset.parts["coco"].files["train2014"]
    file.size, file.sha256, file.md5 = len(whole.content), None, None
    whole.cuts = [PIECE, *[0] * 9]
    monkeypatch.setattr("blip2x.transfer.download.WAITS", (0,))
    with pytest.raises(UserError, match=r"train2014: .*the same command continues"):
        prepare(cfg)
    whole.cuts = []
    web.asked.clear()
    prepare(cfg)
    assert web.asked == [("/coco/train2014.zip", f"bytes={PIECE}-", '"one"')]


def test_offline_says_what_is_missing_and_where_it_goes(config, prepare, web):
    with pytest.raises(UserError) as error:
        prepare(offline(config("vqav2")))
    lines = str(error.value).splitlines()
    assert lines[0] == "vqav2 is not complete:" and len(lines) == 9 and web.asked == []
    assert lines[1].endswith(
        f"put {web.url}/coco/train2014.zip there as data/coco/train2014.zip, or its content as data/coco/images/train2014"
    )
    prepare(config("vqav2"))
    web.asked.clear()
    prepare(offline(config("vqav2")))
    with pytest.raises(UserError, match=r"val_images: paths.offline=true|captions_val: paths.offline=true"):
        prepare(offline(config("nocaps")))
    assert web.asked == []


def test_offline_unpacks_what_was_put_there(config, prepare, web, tmp_path):
    cfg = offline(config("coco", skip=KARPATHY))
    (tmp_path / "data/coco").mkdir(parents=True)
    for name in ("train2014.zip", "val2014.zip"):
        (tmp_path / "data/coco" / name).write_bytes(web.files[f"/coco/{name}"].content)
    prepare(cfg)
    assert len(list((tmp_path / "data/coco/images/val2014").iterdir())) == len(layouts.VAL) and web.asked == []


def test_what_is_there_unpacked_is_taken_if_it_is_whole(config, prepare, web, tmp_path):
    cfg = config("coco", skip=[*KARPATHY, "val2014"])
    folder = tmp_path / "data/coco/images/train2014"
    folder.mkdir(parents=True)
    (folder / "COCO_train2014_000000000009.jpg").write_bytes(layouts.picture("red"))
    with pytest.raises(
        UserError, match=r"train2014: .*/train2014 has 1 files, but 2 were expected; remove it to fetch it anew"
    ):
        prepare(cfg)
    (folder / "COCO_train2014_000000000025.jpg").write_bytes(layouts.picture("red"))
    prepare(cfg)
    assert web.asked == []


def test_an_empty_folder_is_not_the_data_set_and_what_was_found_is_not_verified(config, prepare, said, web, tmp_path):
    """Visual Genome's owners say nothing of how many files there are."""
    cfg = config("vg", skip=["vg_caption"])
    first, second = (tmp_path / "data/vg/images" / name for name in ("VG_100K", "VG_100K_2"))
    first.mkdir(parents=True)
    second.mkdir()
    (second / "1.jpg").write_bytes(layouts.picture("red"))
    with pytest.raises(UserError, match=r"images: there is no data/vg/images/VG_100K, or nothing in it; python runners"):
        prepare(with_options(cfg, verify=True))
    prepare(with_options(cfg, verify=False))
    assert web.paths() == ["/vg/images.zip"] and files_below(first) == ["61.jpg"]
    prepare(with_options(cfg, verify=True))
    states = [line.split() for line in said().splitlines() if line.split()[:1] in (["images"], ["images2"])]
    assert [words[3] for words in states[-2:]] == ["verified", "there"]


def test_a_folder_that_was_made_anew_is_counted_anew(config, prepare, web, tmp_path):
    cfg = config("vg", skip=["vg_caption"])
    prepare(cfg)
    folder = tmp_path / "data/vg/images/VG_100K"
    (folder / "61.jpg").rename(folder.parent / "61.jpg")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "2.jpg").symlink_to(folder.parent / "61.jpg")  # the same picture
    prepare(cfg)
    (folder / "3.jpg").write_bytes(layouts.picture("red"))
    with pytest.raises(UserError, match=r"images: .*/VG_100K has 2 files, but 1 were expected; remove it to fetch it anew"):
        prepare(cfg)
    shutil.rmtree(folder)
    prepare(cfg)
    assert files_below(folder) == ["61.jpg"]


def test_archives_of_earlier_runs_are_removed_as_well(config, prepare, web, tmp_path):
    prepare(config("coco"))
    web.asked.clear()
    cfg = config("coco", keep_archives=False)
    prepare(cfg)
    assert not [path for path in files_below(tmp_path / "data") if "zip" in path] and web.asked == []
    prepare(with_options(cfg, verify=True))


def test_a_page_to_log_in_is_not_what_was_seen_first(config, prepare, web, tmp_path):
    cfg = config("gqa")
    page = b"<!DOCTYPE html><html>Log in</html>"
    questions = web.files["/gqa/questions1.2.zip"]
    questions.content, file = page, questions.content
    with pytest.raises(UserError, match=r"questions1.2.zip is broken, or no archive .*; remove it to fetch it anew"):
        prepare(cfg)
    questions.content = file
    (tmp_path / "data/gqa/questions1.2.zip").unlink()
    prepare(cfg)
    cfg = config("vg", images=False)
    caption = web.files["/annotations/vg_caption.json"]
    caption.content, file = page, caption.content
    with pytest.raises(
        UserError, match=r"vg_caption.json is no JSON file: it begins with b'<!DOCTYPE.*, and was removed; fetch"
    ):
        prepare(cfg)
    caption.content = file
    prepare(cfg)


def test_annotations_that_were_put_there_by_hand(config, prepare, web, tmp_path):
    """As NoCaps's have to be, where the old addresses are gone."""
    cfg = config("nocaps", images=False)
    names = ("nocaps_val_4500_captions.json", "nocaps_test_image_info.json")
    folder = tmp_path / "data/nocaps/annotations"
    folder.mkdir(parents=True)
    (folder / names[1]).write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"nocaps_test_image_info.json is no JSON file: it begins with b'<html>'; remove it"):
        prepare(cfg)
    for name in names:
        (folder / name).write_bytes(web.files[f"/annotations/{name}"].content)
        web.files[f"/annotations/{name}"].status = 404
    web.asked.clear()
    prepare(cfg)
    assert web.asked == []
    prepare(with_options(cfg, images=True))


def test_a_folder_that_cannot_be_written_does_not_hide_what_is_in_it(config, prepare, web, tmp_path, monkeypatch):
    cfg = config("coco")
    prepare(cfg)
    (tmp_path / "data/.blip2x-prepared.json").unlink()

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("blip2x.transfer.prepared.write_json", refuse)
    web.asked.clear()
    assert prepare(cfg).metrics["things"] == 5 and web.asked == []


def test_a_full_disk_is_found_before_anything_is_fetched(config, prepare, web, monkeypatch):
    cfg = config("coco")
    monkeypatch.setattr("blip2x.tasks.common.prepared_files.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"about .* are needed .* has 1.0 kB free; .* task.keep_archives=false"):
        prepare(cfg)
    assert web.asked == []


def test_verify_finds_what_has_changed_and_fetches_nothing(config, prepare, web, tmp_path):
    cfg = with_options(config("coco"), keep_archives=True)
    prepare(cfg)
    web.asked.clear()
    data = tmp_path / "data/coco"
    (data / "annotations/coco_karpathy_val.json").write_text("[]")
    (data / "images" / layouts.coco_name("train2014", 9)).unlink()
    (data / "images" / layouts.coco_name("val2014", 42)).write_bytes(b"short")
    (data / "annotations/coco_karpathy_test.json").unlink()
    with pytest.raises(UserError) as error:
        prepare(with_options(cfg, verify=True))
    train, val, karpathy_val, karpathy_test = str(error.value).splitlines()[1:]
    assert "train2014 has 1 files, but 2 were expected" in train and "that were unpacked; remove it" in val
    assert re.search(r"karpathy_val: .* has the md5 \w+, not \w+; remove it; python runners/run.py task=prepare", karpathy_val)
    assert "karpathy_test: there is no " in karpathy_test and web.asked == []


def test_what_may_not_be_fetched_is_asked_for_and_recognised(config, prepare, web, tmp_path):
    cfg = config("flickr30k")
    with pytest.raises(
        UserError, match=r"flickr30k_images: there is no .*/flickr30k-images, and it cannot be fetched for you: fill in"
    ):
        prepare(cfg)
    assert (tmp_path / "data/flickr30k/annotations/flickr30k_test.json").is_file()
    prepare(with_options(cfg, images=False))
    layouts.put_by_hand(cfg, web)
    prepare(with_options(cfg, images=True))


def test_linked_images_that_cannot_be_fetched(config, prepare, said, web, tmp_path):
    """Captions are written of what is there; where the annotations are the owner's, a missing image is an error."""
    prepare(config("cc12m"))
    rows = [json.loads(line) for line in (tmp_path / "data/cc12m/annotations/cc12m_train.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a red picture", "a green picture", "a blue picture"]
    assert "3 images are there, 1 cannot be had (1 HTTP 404)" in said()
    cfg = config("nocaps")
    gone = f"/open-images/val/{layouts.NOCAPS['val'][0]}"
    web.files[gone].status = 404
    for _ in range(2):
        with pytest.raises(UserError, match=r"val_images: 1 of 2 images could not be fetched; why is in .*retry_failed=true"):
            prepare(cfg)
    assert web.paths().count(gone) == 1
    web.files[gone].status = 200
    cfg.task.links.retry_failed = True
    prepare(cfg)


def test_linked_images_whose_captions_are_unusable(config, prepare, said, monkeypatch, tmp_path):
    links = layouts._links
    monkeypatch.setattr(layouts, "_links", lambda url: [links(url)[0] | {"caption": "***"}, *links(url)[1:]])
    prepare(config("cc12m"))
    rows = [json.loads(line) for line in (tmp_path / "data/cc12m/annotations/cc12m_train.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a green picture", "a blue picture"]
    assert "3 images are there, 1 of them left out for want of a usable caption, 1 cannot be had (1 HTTP 404)" in said()


def test_verify_misses_linked_images(config, prepare, web, tmp_path):
    cfg = config("sbu")
    with pytest.raises(UserError, match=r"sbu_train: data/sbu/images is not complete; python runners/run.py task=prepare"):
        prepare(with_options(cfg, verify=True))
    prepare(with_options(cfg, verify=False))
    next((tmp_path / "data/sbu/images").glob("*/*.jpg")).unlink()
    web.asked.clear()
    with pytest.raises(UserError, match=r"sbu_train: 1 images of data/sbu/images are gone; .*task.links.retry_failed=true"):
        prepare(with_options(cfg, verify=True))
    assert web.asked == []


def test_linked_images_that_are_all_empty_or_gone_with_their_record(config, prepare, said, web, tmp_path):
    cfg = config("nocaps")
    prepare(cfg)
    images = sorted((tmp_path / "data/nocaps/images").glob("*.jpg"))
    for image in images:
        image.write_bytes(b"")
    web.asked.clear()
    with pytest.raises(UserError, match=r"val_images: 2 images of .* are gone; .*\n  test_images: 1 images of .* are gone"):
        prepare(with_options(cfg, verify=True))
    shutil.rmtree(images[0].parent)
    images[0].parent.mkdir()
    with pytest.raises(UserError, match=r"val_images: data/nocaps/images is not complete; python runners"):
        prepare(cfg)
    assert web.asked == []
    prepare(with_options(cfg, verify=False))
    (tmp_path / "data/nocaps/images/.links.tsv").write_bytes(b"")
    with pytest.raises(UserError, match=r"val_images: 2 images of .* are gone"):
        prepare(with_options(cfg, verify=True))


def test_no_linked_image_at_all_is_no_success(config, prepare, web):
    cfg = config("sbu")
    for number in range(layouts.WEB - 1):
        web.files[f"/web/{number}.jpg"].status = 404
    for _ in range(2):
        with pytest.raises(UserError, match=r"sbu_train: 4 of 4 images could not be fetched; why is in .*retry_failed=true"):
            prepare(cfg)
    with pytest.raises(UserError, match="sbu_train: 4 of 4 images could not be fetched"):
        prepare(with_options(cfg, verify=True))


def test_two_lists_share_their_pictures(config, prepare, web, tmp_path):
    prepare(config("ccs"))
    rows = [json.loads(line) for line in (tmp_path / "data/ccs/annotations/ccs_train.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a red picture", "a green picture", "a picture", "a picture"]
    assert rows[1]["image"] == rows[2]["image"] and web.paths().count("/web/1.jpg") == 1


def test_parts_that_want_one_place_for_two_files(config):
    cfg = config("coco_vg")
    cfg.dataset.parts["vg"].files["other"] = type(cfg.dataset.parts["vg"].files["images"])(
        url="http://x/y.zip", path=cfg.dataset.parts["coco"].files["train2014"].path
    )
    with pytest.raises(UserError, match=r"train2014 and other are both to be .*/coco/train2014.zip"):
        Prepare.check(cfg)


def test_mistakes(config):
    with pytest.raises(UserError, match=r"task.skip: coco has no val2015; it has karpathy_test, karpathy_train"):
        Prepare.check(config("coco", skip=["val2015"]))
    cfg = compose_config(["task=prepare"])
    with pytest.raises(UserError, match="dataset=digits has nothing that could be fetched"):
        Prepare.check(cfg)
    cfg = config("coco")
    cfg.dataset.parts["coco"].files["val2014"].gives = []
    with pytest.raises(UserError, match="val2014: unpack and gives go together"):
        Prepare.check(cfg)
    cfg.dataset.parts["coco"].files["val2014"].gives = ["../x"]
    with pytest.raises(UserError, match=r"gives has '\.\./x', which is no path below"):
        Prepare.check(cfg)


def test_an_interrupt_ends_all_transfers_and_the_next_run_goes_on(config, prepare, web, tmp_path):
    cfg = config("coco")
    gate = threading.Event()
    for name in ("train2014", "val2014"):
        web.files[f"/coco/{name}.zip"].cuts, web.files[f"/coco/{name}.zip"].gate = [100], gate
    before = signal.signal(signal.SIGINT, lambda *_: (_ for _ in ()).throw(Interrupted("SIGINT")))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(Interrupted):
            prepare(cfg)
    finally:
        signal.signal(signal.SIGINT, before)
        gate.set()
    end = time.monotonic() + 10
    while any(
        thread.name.startswith("Thread") and "work" in thread.name and thread.is_alive() for thread in threading.enumerate()
    ):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not (tmp_path / "data/coco/images/train2014").exists()
    for name in ("train2014", "val2014"):
        web.files[f"/coco/{name}.zip"].gate = None
    prepare(cfg)
    assert len(list((tmp_path / "data/coco/images/val2014").iterdir())) == len(layouts.VAL)


def test_checksums_in_the_yaml_files_look_like_checksums():
    for name in DATASETS:
        for part in composed(name).dataset.parts.values():
            for key, file in part.files.items():
                assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "0" * 64), key
                assert re.fullmatch("[0-9a-f]{32}", file.md5 or "0" * 32), key


def test_every_named_annotation_comes_from_somewhere():
    """A file that a split names is fetched, written, or asked for."""
    for name in DATASETS:
        dataset = composed(name).dataset
        plan = Plan.of(dataset, composed(name).task)
        there = {str(path) for file in plan.files.values() for path in layouts.ends(file)}
        there |= {linked.cfg.captions for linked in plan.linked.values()}
        for part in dataset.parts.values():
            assert {str(path) for path in layouts.annotation_files(part)} <= there, name


def test_it_needs_neither_paddle_nor_a_model():
    code = "import sys, blip2x.tasks.prepare; print('paddle' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_two_runs_at_once_fetch_each_file_once(config, prepare, web):
    cfg = config("coco", keep_archives=False)
    gate = threading.Event()
    web.files["/coco/train2014.zip"].cuts, web.files["/coco/train2014.zip"].gate = [100], gate
    other = threading.Thread(target=prepare, args=[copy.deepcopy(cfg)])
    other.start()
    threading.Timer(0.2, gate.set).start()
    prepare(cfg)
    other.join()
    assert sorted(web.paths()) == sorted({*web.paths()}) and len(web.paths()) == 5
