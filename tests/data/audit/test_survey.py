"""Whatever is planted into a data set is found, and nothing is found in a clean one."""

from __future__ import annotations

import json
import shutil

import pytest

from blip2x.data.audit.survey import survey
from blip2x.data.audit.verdicts import Verdict, judge
from blip2x.data.source import Source
from blip2x.data.sources.digits import Digits
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import UserError


def entry(image, *captions):
    return {"image": image, "caption": list(captions) or [f"a picture called {image}"]}


def verdicts(found) -> dict[tuple[str, str], Verdict]:
    return {(line.where, line.check): line.verdict for line in judge(found.figures)}


def bad(found) -> dict[tuple[str, str], str]:
    return {what: verdict.value for what, verdict in verdicts(found).items() if verdict is not Verdict.fine}


def advice(found) -> str:
    (line,) = [line for line in judge(found.figures) if (line.where, line.check) == ("train", "each image once")]
    return line.advice


@pytest.fixture
def clean(custom, picture):
    """Four images to train on and two to evaluate on, with captions, and questions about the latter."""
    train = [entry(picture(f"{n}.png", n)) for n in range(4)]
    names = [picture(f"eval/{n}.jpg", n) for n in (4, 5)]
    questions = [
        {"image": name, "question": f"which {what} is it?", "answer": ["red"] * 3}
        for name in names
        for what in ("colour", "shape", "side")
    ]
    return custom(train_captions=train, eval_captions=[entry(name) for name in names], eval_questions=questions)


def test_clean_set_is_fine_everywhere(clean, look, bars):
    found, bad_images = look(clean, tokenizers={"Q-Former": train_tokenizer([], "bert")})
    assert not bad(found) and not bad_images
    splits = found.figures["splits"]
    assert list(splits) == ["train", "eval"]
    assert found.figures["same_as"] == {"val captions": "eval captions", "val questions": "eval questions"}
    assert splits["train"]["images"]["count"] == splits["train"]["images"]["opened"] == 4
    assert splits["train"]["captions"]["per_image"]["median"] == 1
    questions = splits["eval"]["questions"]
    assert questions["texts"] == 6 and questions["per_image"]["min"] == 3 and questions["answers"]["max"] == 3
    assert splits["train"]["images"]["modes"] == {"RGB": 4}
    assert questions["tokens"]["Q-Former"]["max"] == 7  # five words and marks, and both ends
    assert {len(sheet) for sheet in found.sheets.values()} == {4, 2} and not found.groups
    assert all(steps == made for _, steps, made, _ in bars.made)
    json.dumps(found.figures)


def test_files_of_several_splits_are_gone_through_once(custom, picture, look, bars):
    source = custom(train_captions=[entry(picture("0.png", 0))])
    source.cfg.val_split, source.cfg.eval_split = "train", "train"
    found, _ = look(source)
    assert [description for description, *_ in bars.made] == ["train captions", "train images"]
    assert found.figures["same_as"] == {"eval captions": "train captions", "val captions": "train captions"}
    assert not bad(found)


def test_other_files_with_the_same_samples_are_the_same_too(custom, picture, look, bars):
    rows = [entry(picture("0.png", 0))]
    found, _ = look(custom(val_captions=rows, eval_captions=rows))
    assert [description for description, *_ in bars.made] == ["eval captions", "val captions", "eval images"]
    assert found.figures["same_as"] == {"val captions": "eval captions"}


def test_files_of_several_splits_that_cannot_be_read_are_one_finding(custom, look):
    source = custom(train_captions="[{")
    source.cfg.val_split, source.cfg.eval_split = "train", "train"
    found, _ = look(source)
    assert list(found.figures["unreadable"]) == ["train captions"]


def test_missing_and_broken_images_do_not_stop_it_and_are_named(custom, picture, look, tmp_path):
    picture("good.png", 1)
    (tmp_path / "images" / "empty.jpg").write_bytes(b"")
    (tmp_path / "images" / "text.png").write_text("no picture")
    rows = [entry(name) for name in ("good.png", "gone.jpg", "empty.jpg", "text.png")]
    found, bad_images = look(custom(train_captions=rows))
    images = found.figures["splits"]["train"]["images"]
    assert (images["count"], images["missing"]["count"], images["opened"], images["broken"]["count"]) == (4, 1, 3, 2)
    assert len(bad_images) == 3
    reasons = (("gone.jpg", "does not exist"), ("empty.jpg", "is empty"), ("text.png", "is not an image"))
    for line, (name, reason) in zip(bad_images, reasons, strict=True):  # missing ones first, in the order of the file
        assert line.startswith("train: ") and name in line and reason in line
    assert bad(found) == {("train", "images are there"): "broken", ("train", "images open"): "broken"}


def test_long_names_are_whole_where_bad_images_are_named(custom, look):
    name = "/".join(["folder" * 10] * 6) + "/a\nb.jpg"
    _, bad_images = look(custom(train_captions=[entry(name, "a cat")]))
    assert len(bad_images) == 1 and name.replace("\n", "\\n") in bad_images[0]


def test_all_images_may_be_missing_and_the_folder_too(custom, look, tmp_path):
    source = custom(train_captions=[entry("a.jpg"), entry("b.jpg")])
    (tmp_path / "images").rmdir()
    found, bad_images = look(source)
    assert found.figures["splits"]["train"]["images"]["missing"]["count"] == len(bad_images) == 2


def test_unreadable_annotations_are_told_and_the_rest_is_looked_at(custom, picture, look):
    found, _ = look(custom(train_captions="[{", eval_captions=[entry(picture("a.png", 1))]))
    assert "is not valid JSON" in found.figures["unreadable"]["train captions"]
    assert bad(found) == {("train captions", "annotations"): "broken"}
    assert found.figures["splits"]["eval"]["images"]["opened"] == 1


@pytest.mark.parametrize(("chosen", "opened"), [(0, 0), (3, 3), (99, 4)])
def test_some_images_are_opened_by_lot(clean, look, chosen, opened):
    found, _ = look(clean, open_images=chosen)
    assert found.figures["splits"]["train"]["images"]["opened"] == opened
    assert len(found.sheets["train"]) == (opened or 4)  # it also has pictures where none was opened
    checks = {("train", "images open"), ("train", "each image once"), ("eval", "images open"), ("eval", "each image once")}
    unknown = checks | {("train and eval", "no image in both")}
    assert bad(found) == (dict.fromkeys(unknown, "look") if not opened else {})


def test_copies_within_a_split(custom, picture, look, scene, tmp_path):
    rows = [entry(picture("1.png", 1)), entry(picture("2.png", 2)), entry(picture("small.jpg", scene(1, 64), quality=70))]
    shutil.copy(tmp_path / "images" / "2.png", tmp_path / "images" / "copy.png")
    found, _ = look(custom(train_captions=[*rows, entry("copy.png")]))
    images = found.figures["splits"]["train"]["images"]
    assert images["same_file"]["count"] == images["near"]["count"] == 1 and images["same_path"]["count"] == 0
    assert {name.rpartition("/")[2] for name in images["same_file"]["examples"][0]} == {"2.png", "copy.png"}
    assert {name.rpartition("/")[2] for name in images["near"]["examples"][0]} == {"1.png", "small.jpg"}
    assert set(found.groups) == {"train: the same file", "train: nearly the same"}
    assert bad(found) == {("train", "each image once"): "look"}
    assert "remove them" in advice(found) and "near copies" in advice(found)


def test_nobody_is_told_to_remove_pictures_that_only_look_alike(custom, picture, look, scene):
    rows = [entry(picture("1.png", 1)), entry(picture("small.jpg", scene(1, 64), quality=70))]
    found, _ = look(custom(train_captions=rows))
    assert bad(found) == {("train", "each image once"): "look"}
    assert "remove" not in advice(found) and "should stay" in advice(found)


def test_leaks_by_name_file_and_look(custom, picture, look, scene, tmp_path):
    """A copy with another encoding and size has another file hash, and the same look."""
    train = [entry(picture(f"{n}.png", n)) for n in range(4)]
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "copy.png")
    picture("small.jpg", scene(2, 72), quality=60)
    again = [entry(name) for name in ("0.png", "copy.png", "small.jpg", picture("9.png", 9))]
    found, _ = look(custom(train_captions=train, eval_captions=again))
    (leak,) = found.figures["across"]
    assert leak["splits"] == ["train", "eval"] and leak["images"] == 4
    assert [leak[how]["count"] for how in ("same_path", "same_file", "near")] == [1, 1, 1]
    assert [name.rpartition("/")[2] for name in leak["near"]["examples"][0]] == ["2.png", "small.jpg"]
    assert [name.rpartition("/")[2] for name in leak["same_file"]["examples"][0]] == ["1.png", "copy.png"]
    assert bad(found) == {("train and eval", "no image in both"): "broken"}
    look_alone, _ = look(custom(train_captions=train, eval_captions=again[2:]))
    assert bad(look_alone) == {("train and eval", "no image in both"): "look"}


def test_picture_traits_are_counted(custom, picture, look, scene):
    grey = scene(1).convert("L")
    glass = scene(2).convert("RGBA")
    glass.putalpha(100)
    exif = scene(3).getexif()
    exif[0x0112] = 6
    names = [
        picture("grey.png", grey),
        picture("grey_in_colour.png", scene(4).convert("L").convert("RGB")),
        picture("glass.png", glass),
        picture("turned.jpg", scene(3).resize((96, 48)), exif=exif),
        picture("moving.gif", scene(5), save_all=True, append_images=[scene(6)]),
        picture("large.png", scene(7, 200)),
    ]
    found, _ = look(custom(train_captions=[entry(name) for name in names]))
    images = found.figures["splits"]["train"]["images"]
    assert {key: images[key] for key in ("grey", "transparent", "rotated", "animated")} == {
        "grey": 2, "transparent": 1, "rotated": 1, "animated": 1,
    }  # fmt: skip
    assert images["modes"] == {"RGB": 3, "L": 1, "RGBA": 1, "P": 1}
    assert images["smallest"]["image"].endswith("turned.jpg") and images["smallest"]["size"] == [96, 48]
    assert images["largest"]["image"].endswith("large.png")
    assert (images["width"]["min"], images["width"]["median"], images["width"]["max"]) == (96, 96, 200)


def test_texts(custom, picture, look):
    rows = [
        entry(picture("0.png", 0), "A cat.", "a dog", "a cat"),
        entry(picture("1.png", 1), "...", "see <b>this</b> at www.shop.com", "\u043a\u043e\u0442"),
        entry(picture("2.png", 2), " ".join(["word"] * 20)),
    ]
    questions = [{"image": "0.png", "question": text, "answer": "yes"} for text in ("Is it a cat?", "is it  a cat?", "why?")]
    source = custom(train_captions=rows, eval_questions=questions)
    found, _ = look(source, tokenizers={"Q-Former": train_tokenizer([], "bert")}, max_txt_len=21)
    captions = found.figures["splits"]["train"]["captions"]
    assert captions["texts"] == 7 and captions["words"]["max"] == 20
    assert captions["twice"] == {"count": 1, "examples": [{"image": rows_path(source, "0.png"), "text": "a cat"}]}
    assert captions["empty"]["examples"][0]["text"] == "..."
    assert {kind: finding["count"] for kind, finding in captions["odd"].items()} == {
        "HTML": 1, "web addresses": 1, "Cyrillic letters": 1,
    }  # fmt: skip
    assert captions["tokens"]["Q-Former"]["cut"] == 1 and captions["tokens"]["Q-Former"]["max"] == 22
    assert found.figures["splits"]["eval"]["questions"]["twice"]["count"] == 1
    assert bad(found) == {
        ("train captions", "texts are not empty"): "broken",
        ("train captions", "length for the Q-Former"): "look",
        ("train captions", "characters"): "look",
        ("train captions", "each text once per image"): "look",
        ("eval questions", "each text once per image"): "look",
        ("train and eval", "no image in both"): "broken",
    }


@pytest.mark.parametrize(
    ("text", "check", "verdict"), [("!!!", "texts are not empty", "broken"), ("???", "texts have words", "look")]
)
def test_captions_are_broken_exactly_where_no_training_starts(custom, picture, look, text, check, verdict):
    source = custom(train_captions=[entry(picture("0.png", 0), text)])
    found, _ = look(source)
    assert {check: how for (where, check), how in bad(found).items() if where == "train captions"}.get(check) == verdict
    if verdict == "broken":
        with pytest.raises(UserError, match="empty but for punctuation"):
            source.captions("train")
    else:
        assert source.captions("train")[0].captions == (text,)


def rows_path(source, name):
    return f"{source.cfg.parts['custom'].images}/{name}"


def test_captions_that_many_images_share(custom, picture, look):
    rows = [entry(picture(f"{n}.png", n), "A photo.", f"number {n}") for n in range(12)]
    found, _ = look(custom(train_captions=rows))
    assert found.figures["splits"]["train"]["captions"]["repeated"] == {
        "count": 12, "examples": [{"text": "A photo.", "images": 12}],
    }  # fmt: skip
    assert bad(found) == {("train captions", "captions tell images apart"): "look"}


def test_digits_are_painted_and_their_val_is_their_eval(digits_config, look):
    digits_config.train_scenes, digits_config.test_scenes = 30, 20
    found, _ = look(Digits(digits_config))
    splits = found.figures["splits"]
    assert {split: figures["images"]["opened"] for split, figures in splits.items()} == {"train": 30, "eval": 20}
    assert found.figures["same_as"] == {"val captions": "eval captions", "val questions": "eval questions"}
    assert splits["eval"]["captions"]["groups"] == {"seen": 15, "held_out": 5}
    (of_train,) = found.figures["across"]
    assert of_train["same_file"]["count"] == 0 and "broken" not in bad(found).values()


def test_parts_of_a_mixture_may_share_images(look, custom, picture):
    source = custom(train_captions=[entry(picture("0.png", 0)), entry(picture("1.png", 1))])
    first = source.cfg.parts["custom"]
    source.cfg.parts["again"] = type(first)(images=first.images, splits=first.splits)
    found, _ = look(source)
    images = found.figures["splits"]["train"]["images"]
    assert images["count"] == images["opened"] == 2 and images["same_path"]["count"] == 2
    assert bad(found) == {("train", "each image once"): "look"}


def test_data_set_without_captions_and_questions_is_refused(settings):
    source = Source()
    source.name, source.skipped = "nothing", []
    with pytest.raises(UserError, match="neither captions nor questions"):
        survey(source, settings(), None)
