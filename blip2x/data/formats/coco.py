"""COCO's own files, and NoCaps's: {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption"}]}.

Without annotations, as in the files of test images, nobody knows the captions. In a file with annotations each image has some,
as in COCO's own of 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import image_path, read_lists
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS


@ANNOTATION_FORMATS.register("coco")
class Coco:
    """An image's path is its ``file_name``, or ``image`` of the config filled in with that or the number."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._path, self._template = files.captions, files.image or "{file_name}"

    def files(self) -> list[Path]:
        """The one file."""
        return [Path(self._path)]

    def captions(self) -> Iterator[CaptionRow]:
        """One row per image, with its ``domain`` where it has one."""
        captions: dict[int, list[str]] = {}
        unlisted: dict[int, str] = {}  # images of annotations, and where each is named first
        images, annotations = read_lists(self._path, "images", "annotations")
        for entry in annotations:
            number = entry.number("image_id")
            unlisted.setdefault(number, entry.where)
            captions.setdefault(number, []).extend(entry.texts("caption"))
        for entry in images:
            number = entry.number("id")
            unlisted.pop(number, None)
            image = image_path(self._template, entry.where, number, file_name=entry.values.get("file_name", ""))
            yield CaptionRow(entry.where, image, tuple(captions.get(number, ())), number, entry.label("domain", ""))
        for number, where in unlisted.items():
            raise UserError(f"{where} is of image {number}, which is not among the 'images'; add it or remove the annotation")

    def questions(self) -> Iterator[QuestionRow]:
        """There are none in such files."""
        raise UserError(f"format: coco has no questions; the format of {self._path} must be vqa or entries")
