"""The field's data sets in tiny: a few pictures and texts each, in files of the true names, schemas and folders.

`publish` puts a data set's files on a web server of the test and points the config there, so that `task=prepare` makes the
layout that everything else reads; `put_by_hand` adds what users have to get themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from blip2x.config.dataset import ImageTextPart, RemoteFile
from blip2x.config.run import RunConfig
from tests.web_server import WebFile, WebServer

COLOURS = ("red", "green", "blue", "yellow")
TRAIN, VAL, TEST = (9, 25), (42, 73, 74, 133), (1, 14)  # COCO's numbers; the Karpathy split trains on one of the second
VG = {"VG_100K/61.jpg": "red", "VG_100K_2/1.jpg": "blue"}
GQA = {"2375429": "green", "n161313": "yellow"}
NOCAPS = {"val": ("0013ea2087020901.jpg", "00141571d986d241.jpg"), "test": ("0000d67245642c5f.jpg",)}
FLICKR = (1000092795, 10002456, 1000268201)
WEB = 4  # pictures at /web/N.jpg, the last of which does not exist


def picture(colour: str, size: tuple[int, int] = (32, 24), format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def coco_name(split: str, number: int) -> str:
    return f"{split}/COCO_{split}_{number:012d}.jpg"


def publish(cfg: RunConfig, web: WebServer) -> RunConfig:
    """Serve all files of the data set, and have the config name them with the size, checksum and count of the tiny ones."""
    for number in range(WEB - 1):
        web.files[f"/web/{number}.jpg"] = WebFile(picture(COLOURS[number]))
    for split, names in NOCAPS.items():
        for name in names:
            web.files[f"/open-images/{split}/{name}"] = WebFile(picture("red"))
    for part in cfg.dataset.parts.values():
        for file in part.files.values():
            publish_file(file, web)
    return cfg


def publish_file(file: RemoteFile, web: WebServer) -> None:
    """One of them; what is not published of the true file stays unknown of the tiny one."""
    name = Path(file.path).name
    path = "/" + "/".join(Path(file.path).parts[-2:])
    content, members = _gqa_images() if path == "/gqa/images.zip" else remote(name, web.url)
    if name == "questions1.2.zip":
        members = len(file.gives)
    web.files[path] = WebFile(content)
    file.url = f"{web.url}{path}"
    file.size = file.size and len(content)
    file.sha256 = file.sha256 and hashlib.sha256(content).hexdigest()
    file.md5 = file.md5 and hashlib.md5(content).hexdigest()
    file.members = file.members and members


def put_by_hand(cfg: RunConfig, web: WebServer) -> None:
    """What cannot be fetched, where its message says."""
    for part in cfg.dataset.parts.values():
        for name, thing in part.by_hand.items():
            path = Path(thing.path)
            if name == "flickr30k_images":
                path.mkdir(parents=True)
                for number in FLICKR:
                    (path / f"{number}.jpg").write_bytes(picture("green"))
            elif name == "laion_shards":
                path.mkdir(parents=True)
                for shard in range(2):
                    (path / f"{shard:05d}.tar").write_bytes(_shard(shard))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{row['caption']}\t{row['url']}\n" for row in _links(web.url)))


def remote(name: str, url: str) -> tuple[bytes, int]:
    """A file of that name, and how many files come out of it; `url` is the server of the pictures that are linked."""
    content = _FILES[name](url)
    if isinstance(content, bytes):
        return content, 1
    return zipped(content), sum(not member.startswith("__MACOSX") and not member.endswith("/") for member in content)


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _coco_images(split: str, numbers: tuple[int, ...]) -> dict[str, bytes]:
    return {f"{split}/": b""} | {
        coco_name(split, number): picture(COLOURS[at % len(COLOURS)]) for at, number in enumerate(numbers)
    }


def _gqa_images() -> tuple[bytes, int]:
    return zipped({f"images/{name}.jpg": picture(colour) for name, colour in GQA.items()}), len(GQA)


def _karpathy(split: str) -> bytes:
    if split == "train":
        rows = [(coco_name("train2014", TRAIN[0]), TRAIN[0]), (coco_name("val2014", VAL[0]), VAL[0])]
        return _json(
            [
                {"caption": f"A {colour} square {place}. ", "image": image, "image_id": f"coco_{number}"}
                for image, number in rows
                for colour, place in (("red", "alone"), ("plain", "on its own"))
            ]
        )
    number = VAL[1] if split == "val" else VAL[2]
    return _json([{"image": coco_name("val2014", number), "caption": [f"Square {at} is plain." for at in range(5)]}])


def _questions(images: tuple[int, ...], split: str) -> bytes:
    rows = [
        {"image_id": number, "question": text, "question_id": number * 1000 + at}
        for number in images
        for at, text in enumerate(("What colour is the square?", "Is it red?", "How many squares are there?"))
    ]
    return _json({"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split, "questions": rows})


def _answers(images: tuple[int, ...], split: str) -> bytes:
    rows = []
    for number in images:
        for at, (answer, kind, start) in enumerate(
            (("red", "other", "what"), ("yes", "yes/no", "is it"), ("1", "number", "how many"))
        ):
            given = [{"answer": answer, "answer_confidence": "yes", "answer_id": each} for each in range(1, 11)]
            rows.append(
                {
                    "question_id": number * 1000 + at,
                    "image_id": number,
                    "question_type": start,
                    "answer_type": kind,
                    "multiple_choice_answer": answer,
                    "answers": given,
                }
            )
    return _json({"info": {}, "data_type": "mscoco", "data_subtype": split, "annotations": rows})


def _gqa(name: str) -> bytes:
    image, colour = next(iter(GQA.items()))
    entry = {"question": "What colour is it?", "answer": colour, "fullAnswer": f"It is {colour}.", "imageId": image}
    types = {"structural": "query", "semantic": "attr", "detailed": "categoryAttr"}
    return _json({f"{name}1": entry | {"isBalanced": True, "types": types}})


def _nocaps(split: str, url: str) -> bytes:
    images = [
        {
            "id": number,
            "width": 32,
            "height": 24,
            "file_name": name,
            "coco_url": f"{url}/open-images/{split}/{name}",
            "open_images_id": name.removesuffix(".jpg"),
            "domain": ("in-domain", "out-domain")[number % 2],
        }
        for number, name in enumerate(NOCAPS[split])
    ]
    captions = [
        {"image_id": number, "id": number * 10 + at, "caption": f"A red {at}."} for number in range(2) for at in range(10)
    ]
    return _json({"info": {}, "licenses": [], "images": images} | ({"annotations": captions} if split == "val" else {}))


def _flickr(split: str) -> bytes:
    number = FLICKR[("train", "val", "test").index(split)]
    if split == "train":
        rows = [
            {"caption": f"Green {at}.", "image": f"flickr30k-images/{number}.jpg", "image_id": f"flickr_{number}"}
            for at in range(5)
        ]
        return _json(rows)
    return _json([{"image": f"flickr30k-images/{number}.jpg", "caption": [f"Green {at}." for at in range(5)]}])


def _links(url: str) -> list[dict[str, str]]:
    return [{"url": f"{url}/web/{number}.jpg", "caption": f"a {COLOURS[number]} picture"} for number in range(WEB)]


def _shard(number: int) -> bytes:
    members: dict[str, bytes] = {}
    for at in range(2):
        key = f"{number:05d}{at:04d}"
        members |= {f"{key}.jpg": picture(COLOURS[at]), f"{key}.json": _json({"caption": f"a {COLOURS[at]} thing", "key": key})}
    return tarred(members)


def _vg_captions(url: str) -> bytes:
    return _json(
        [{"caption": f"a {colour} wall", "image": image, "image_id": f"vg_{Path(image).stem}"} for image, colour in VG.items()]
    )


def _vg_qa(url: str) -> bytes:
    return _json(
        [
            {"question_id": at, "question": "What colour is the wall?", "answer": colour, "image": image, "dataset": "vg"}
            for at, (image, colour) in enumerate(VG.items())
        ]
    )


def _vg_images(folder: str) -> Callable[[str], dict[str, bytes]]:
    return lambda url: {image: picture(colour) for image, colour in VG.items() if image.startswith(f"{folder}/")}


def _vqa(prefix: str, images: tuple[int, ...], split: str, *, answers: bool = False) -> Callable[[str], dict[str, bytes]]:
    if answers:
        return lambda url: {f"{prefix}mscoco_{split}_annotations.json": _answers(images, split)}
    return lambda url: {f"{prefix}OpenEnded_mscoco_{split}_questions.json": _questions(images, split)}


_FILES: dict[str, Callable[[str], bytes | dict[str, bytes]]] = {
    "train2014.zip": lambda url: _coco_images("train2014", TRAIN),
    "val2014.zip": lambda url: _coco_images("val2014", VAL),
    "test2015.zip": lambda url: _coco_images("test2015", TEST),
    **{f"coco_karpathy_{split}.json": lambda url, split=split: _karpathy(split) for split in ("train", "val", "test")},
    "v2_Questions_Train_mscoco.zip": _vqa("v2_", TRAIN, "train2014"),
    "v2_Annotations_Train_mscoco.zip": _vqa("v2_", TRAIN, "train2014", answers=True),
    "v2_Questions_Val_mscoco.zip": _vqa("v2_", VAL, "val2014"),
    "v2_Annotations_Val_mscoco.zip": _vqa("v2_", VAL, "val2014", answers=True),
    "v2_Questions_Test_mscoco.zip": lambda url: _vqa("v2_", TEST, "test2015")(url) | _vqa("v2_", TEST[:1], "test-dev2015")(url),
    "OpenEnded_mscoco_train2014_questions.json.zip": lambda url: {"__MACOSX/._x": b"x"} | _vqa("", TRAIN, "train2014")(url),
    "mscoco_train2014_annotations.json.zip": _vqa("", TRAIN, "train2014", answers=True),
    "OpenEnded_mscoco_val2014_questions.json.zip": _vqa("", VAL, "val2014"),
    "mscoco_val2014_annotations.json.zip": _vqa("", VAL, "val2014", answers=True),
    "images.zip": _vg_images("VG_100K"),
    "images2.zip": _vg_images("VG_100K_2"),
    "vg_caption.json": _vg_captions,
    "vg_qa.json": _vg_qa,
    "questions1.2.zip": lambda url: {
        **{f"{name}_balanced_questions.json": _gqa(name) for name in ("train", "val", "testdev")},
        "train_all_questions/train_all_questions_0.json": b"{}",
        "readme.txt": b"",
    },
    "nocaps_val_4500_captions.json": lambda url: _nocaps("val", url),
    "nocaps_test_image_info.json": lambda url: _nocaps("test", url),
    **{f"flickr30k_{split}.json": lambda url, split=split: _flickr(split) for split in ("train", "val", "test")},
    "cc12m.tsv": lambda url: "".join(f"{row['url']}\t{row['caption']}\n" for row in _links(url)).encode(),
    "sbu.json": lambda url: _json([row | {"image": f"{at}.jpg"} for at, row in enumerate(_links(url))]),
    "ccs_filtered.json": lambda url: _json(_links(url)[:2]),
    "ccs_synthetic_filtered_large.json": lambda url: _json([row | {"caption": "a picture"} for row in _links(url)[1:]]),
    "laion_synthetic_filtered_large.json": lambda url: _json(_links(url)),
}


def ends(file: RemoteFile) -> list[Path]:
    """Where a file or an archive's members come to be."""
    return [Path(file.unpack) / name for name in file.gives] if file.unpack else [Path(file.path)]


def annotation_files(part: ImageTextPart) -> list[Path]:
    """What the splits of a part name, shards aside."""
    named = [getattr(files, sort) for files in part.splits.values() for sort in ("captions", "questions", "answers")]
    return [Path(name) for name in named if name and part.format != "shards"]
