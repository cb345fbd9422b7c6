"""Small digits settings, and two photographs (that scikit-learn ships) in a folder with annotation files."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip2x.config.dataset import CustomConfig, DigitsConfig, OnBadImage, TransformConfig


@pytest.fixture
def digits_config():
    return DigitsConfig(
        name="digits",
        transform=TransformConfig(mean=[0.5] * 3, std=[0.5] * 3, crop_scale=None, flip=False),
        on_bad_image=OnBadImage.stop,
        num_workers=0,
        max_pixels=10**8,
        eval_limit=None,
        seed=0,
        train_scenes=300,
        test_scenes=80,
        max_digits=3,
        grid=3,
        cell=16,
        colours=["red", "green", "blue", "yellow", "white", "purple"],
        held_out_combinations=6,
        held_out_digits=0.2,
        captions_per_image=4,
        questions_per_image=4,
        captions_per_document=2,
        questions_per_document=3,
    )


@pytest.fixture
def photos(tmp_path):
    """A folder with china.jpg and flowers/flower.jpg."""
    shipped = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
    folder = tmp_path / "images"
    (folder / "flowers").mkdir(parents=True)
    shutil.copy(shipped / "china.jpg", folder)
    shutil.copy(shipped / "flower.jpg", folder / "flowers")
    return folder


@pytest.fixture
def write(tmp_path):
    """Write an annotation file and give its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def custom_config(tmp_path, photos, write):
    captions = [
        {"image": "china.jpg", "caption": "A temple, with a red roof!", "image_id": "coco_17"},
        {"image": "flowers/flower.jpg", "caption": ["a purple flower", "one flower"], "image_id": "coco_4"},
        {"image": "china.jpg", "caption": "a chinese temple", "image_id": "coco_17"},
    ]
    questions = [
        {"image": "china.jpg", "question": "What is it?", "answer": ["temple"] * 10, "question_id": 7},
        {"image": "flowers/flower.jpg", "question": "Which colour?", "answer": "purple", "question_id": 9},
    ]
    return CustomConfig(
        name="custom",
        transform=TransformConfig(mean=[0.5] * 3, std=[0.5] * 3, crop_scale=[0.5, 1.0], flip=True),
        on_bad_image=OnBadImage.stop,
        num_workers=0,
        max_pixels=10**8,
        eval_limit=None,
        images=str(photos),
        train_captions=write("train.json", captions),
        val_captions=None,
        eval_captions=write("eval.json", captions),
        train_questions=None,
        val_questions=None,
        eval_questions=write("questions.jsonl", "\n".join(map(json.dumps, questions)) + "\n"),
        annotation_cache=str(tmp_path / "cache"),
    )
