"""Pictures from everywhere through a small model that learned nothing: what is said of which, and what is left out."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import paddle
import pytest
from PIL import Image
from rich.console import Console

from blip2x.config.check_task import check_task
from blip2x.config.compose import compose_config
from blip2x.data.tokenize import train_tokenizer
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.tasks.common import pictures as kept
from blip2x.tasks.common.launch import launch
from blip2x.tasks.common.parts import Parts
from blip2x.tasks.predict import Predict, pictures_and_prompts


@pytest.fixture
def words(small, trained, tmp_path):
    """`words(stage, *inputs)` -> the overrides of a command."""

    def make(stage, *inputs, weights=None, model=small):
        weights = weights or trained / f"pretrain_stage{stage}" / "checkpoint"
        given = ",".join(f"'{entry}'" for entry in inputs)
        decoding = ["task.num_beams=2", "task.max_new_tokens=4", "task.eval_batch_size=2"]
        run = [f"paths.outputs={tmp_path}/outputs", "run_name=p", "overwrite=true"]
        return [
            "task=predict", f"task.stage={stage}", f"task.inputs=[{given}]", f"model.weights={weights}", *model, *decoding, *run
        ]  # fmt: skip

    return make


@pytest.fixture
def predict(words, tmp_path):
    """`predict(stage, *inputs)` -> (metrics, rows of predictions.jsonl)."""

    def run(stage, *inputs, overrides=(), **options):
        results = launch(compose_config([*words(stage, *inputs, **options), *overrides]), ["test"])
        lines = (tmp_path / "outputs/p/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return results["predict"], [json.loads(line) for line in lines]

    return run


def test_all_sorts_of_inputs_each_picture_once_in_order(predict, pictures, server, tmp_path, capsys):
    url, asked = server
    inputs = [f"{url}/more/c.png", pictures / "b.jpg", pictures, f"{pictures}/*.png", f"{url}/more/c.png"]
    metrics, rows = predict(2, *inputs, overrides=["task.prompt=Question: which digit? Short answer:"])
    assert metrics == {"images": 4, "skipped": 0}
    assert [row["source"] for row in rows] == [
        f"{url}/more/c.png", *(str(pictures / name) for name in ("b.jpg", "a.png", "more/c.png"))
    ]  # fmt: skip
    assert asked == ["/more/c.png"]  # neither twice nor for the report
    shown = capsys.readouterr().out
    for row in rows:
        assert row["stage"] == "predict" and row["prompt"] == "Question: which digit? Short answer:"
        assert len(row["texts"]) == len(row["scores"]) == 1 and row["scores"][0] < 0
        assert f"{row['source']}: {row['texts'][0]}" in shown
    assert "prompt: question : which digit ? short answer :" in shown and "predict 2/2" in shown

    folder = tmp_path / "outputs/p"
    with Image.open(folder / rows[1]["image"]) as image:
        assert image.size == (320, 240)
    assert [row["attention"] for row in rows] == [f"attention/{number}.png" for number in range(4)]
    assert all((folder / row["attention"]).is_file() for row in rows)
    report = (folder / "report.html").read_text(encoding="utf-8")
    # four pictures, and four of where the queries look
    assert report.count('src="data:image/') == 8 and all(row["source"] in report for row in rows)
    assert "All 4 pictures" in report


def test_equal_pictures_get_equal_texts_from_file_and_address(predict, pictures, server):
    _, rows = predict(2, f"{server[0]}/a.png", pictures / "a.png", overrides=["task.eval_batch_size=1"])
    assert rows[0]["texts"] == rows[1]["texts"] and rows[0]["scores"] == rows[1]["scores"]


@pytest.mark.parametrize("stage", [1, 2])
def test_several_texts_of_each_stage_best_first(predict, pictures, stage, capsys):
    _, rows = predict(stage, pictures, overrides=["task.num_beams=4", "task.num_return_sequences=3"])
    assert len(rows) == 3
    for row in rows:
        assert len(set(row["texts"])) == 3 and row["scores"] == sorted(row["scores"], reverse=True)
        assert row["prompt"] == ""
    assert f"{rows[0]['scores'][1]:.2f}  {rows[0]['texts'][1]}" in capsys.readouterr().out


def test_sampling_follows_the_seed(predict, pictures):
    options = ["task.do_sample=true", "task.num_beams=1", "task.num_return_sequences=3"]
    texts = [[row["texts"] for row in predict(2, pictures, overrides=[*options, f"seed={seed}"])[1]] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_encoder_decoder_that_the_checkpoint_brings(pictures, predict, small, tmp_path):
    t5 = ["model=tiny_t5", "model.language.encoder_depth=1", "model.language.decoder_depth=1", "model.language.dropout=0.5"]
    t5 += [word for word in small if word != "model.language.depth=1"]
    paddle.seed(0)
    words = train_tokenizer(["which digit? short answer: two"], "t5")
    model = build_stage2(compose_config(t5).model, vocab_size=words.vocab_size)
    save_checkpoint(tmp_path / "t5", model, kind="caption", step=1, tokenizers={"language": words})
    command = ["task.prompt=which digit? short answer:"]
    first = predict(2, pictures, weights=tmp_path / "t5", model=t5, overrides=command)[1]
    assert len(first) == 3 and first == predict(2, pictures, weights=tmp_path / "t5", model=t5, overrides=command)[1]


def test_a_checkpoint_of_another_language_model_is_refused(pictures, predict, small):
    t5 = ["model=tiny_t5", *(word for word in small if word != "model.language.depth=1")]
    with pytest.raises(UserError, match=r"model=tiny_t5 is not the model of .*: model.language.kind is t5, but opt there;"):
        predict(2, pictures, model=t5)


BAD = {"not_a_picture.jpg": b"<html>", "truncated.jpg": None, "empty.png": b""}


@pytest.fixture
def bad(pictures):
    """The folder of `pictures` with three bad ones among them."""
    for name, content in BAD.items():
        (pictures / name).write_bytes((pictures / "b.jpg").read_bytes()[:900] if content is None else content)
    return pictures


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("not_a_picture.jpg", "not_a_picture.jpg is not an image that Pillow can read"),
        ("truncated.jpg", "truncated.jpg is corrupt or truncated"),
        ("empty.png", "empty.png is empty"),
    ],
)
def test_a_bad_picture_stops(predict, bad, name, sentence):
    with pytest.raises(UserError, match=rf"{sentence}.*dataset.on_bad_image=skip"):
        predict(2, bad / "a.png", bad / name)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_and_addresses_are_skipped_counted_and_named(predict, bad, server, tmp_path, capsys, workers):
    gone = f"{server[0]}/gone.jpg"
    overrides = ["dataset.on_bad_image=skip", f"dataset.num_workers={workers}"]
    metrics, rows = predict(2, gone, bad, overrides=overrides)
    assert metrics == {"images": 3, "skipped": 4}
    assert [row["source"] for row in rows] == [str(bad / name) for name in ("a.png", "b.jpg", "more/c.png")]
    assert [row["image"] for row in rows] == ["images/1.png", "images/2.jpg", "images/4.png"]
    skipped = (tmp_path / "outputs/p/skipped.txt").read_text().splitlines()
    assert len(skipped) == 4 and all(any(name in line for line in skipped) for name in (gone, *BAD))
    assert "warning: 4 left out" in capsys.readouterr().out


def test_nothing_but_bad_pictures(predict, bad, tmp_path):
    metrics, rows = predict(2, bad / "empty.png", overrides=["dataset.on_bad_image=skip"])
    assert metrics == {"images": 0, "skipped": 1} and rows == []
    assert (tmp_path / "outputs/p/report.html").is_file()


def test_an_address_that_cannot_be_fetched_stops(predict, server):
    with pytest.raises(UserError, match=r"/gone\.jpg cannot be fetched: the server answers 404"):
        predict(2, f"{server[0]}/gone.jpg")


def test_a_large_picture_is_refused_by_the_data_sets_limit(predict, pictures):
    with pytest.raises(UserError, match=r"400 x 300 pixels, more than dataset.max_pixels=10000"):
        predict(2, pictures / "b.jpg", overrides=["dataset.max_pixels=10000"])


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [("{}/no.jpg", "no file or folder"), ("{}/nothing", "has no picture"), ("{}/*.gif", "matches no picture")],
)
def test_inputs_are_checked_before_anything_is_made(predict, pictures, tmp_path, entry, sentence):
    (pictures / "nothing").mkdir()
    with pytest.raises(UserError, match=sentence):
        predict(2, entry.format(pictures))
    assert not (tmp_path / "outputs").exists()


def test_decoding_options_are_checked_before_anything_is_made(predict, pictures, tmp_path):
    with pytest.raises(UserError, match="num_return_sequences=3 is more than num_beams=2"):
        predict(2, pictures, overrides=["task.num_return_sequences=3"])
    assert not (tmp_path / "outputs").exists()


def test_a_checkpoint_of_the_other_stage_is_refused(predict, pictures, trained, tmp_path):
    for stage, other in ((1, 2), (2, 1)):
        sentence = f"is a checkpoint of pretrain_stage{other}, but task=predict needs one of pretrain_stage{stage}"
        with pytest.raises(UserError, match=sentence):
            predict(stage, pictures, weights=trained / f"pretrain_stage{other}/checkpoint")
    assert not (tmp_path / "outputs").exists()


def test_a_prompt_that_leaves_no_room_is_refused_before_any_picture_is_opened(predict, bad):
    prompt = "a " * 130
    with pytest.raises(UserError, match=r"task.prompt of 130 tokens, 8 queries and task.max_new_tokens=4 make more"):
        predict(2, bad / "empty.png", overrides=[f"task.prompt={prompt}"])


def test_a_moved_run_folder_finds_its_parts(predict, pictures, trained, tmp_path):
    copy = tmp_path / "moved" / "elsewhere"
    shutil.copytree(trained, copy)
    manifest = copy / "pretrain_stage2/checkpoint/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(trained), "/gone/run"))
    before = predict(2, pictures)[1]
    assert predict(2, pictures, weights=copy / "pretrain_stage2/checkpoint")[1] == before
    shutil.rmtree(copy / "pretrain_vision")
    with pytest.raises(UserError, match=r"/gone/run/pretrain_vision/checkpoint, which are not there; set model.vision.weights"):
        predict(2, pictures, weights=copy / "pretrain_stage2/checkpoint")


NORMAL = ["dataset.transform.mean=[0.5,0.5,0.5]", "dataset.transform.std=[0.5,0.5,0.5]"]


def test_the_data_sets_files_are_not_needed_and_its_transform_counts(predict, pictures):
    expected = predict(2, pictures)[1]
    for dataset in (["dataset=custom", "dataset.images=/no/where"], ["dataset=coco"]):
        workers = ["dataset.num_workers=0"]
        assert predict(2, pictures, overrides=[*dataset, *NORMAL, *workers])[1] == expected
        with pytest.raises(UserError, match=r"normalised by mean=\[0.5, 0.5, 0.5\].*but dataset=\w+ has mean=\[0.48"):
            predict(2, pictures, overrides=dataset)


def test_many_pictures_leave_few_copies(predict, pictures, monkeypatch):
    monkeypatch.setattr(kept, "MOST_PICTURES", 2)
    rows = predict(2, pictures)[1]
    assert [row["image"] for row in rows] == ["images/0.png", None, "images/2.png"]
    assert ["attention" in row for row in rows] == [True, False, True]


def test_two_ranks_share_the_pictures_and_the_rows_come_in_order(predict, words, pictures, tmp_path, over_ranks):
    alone = predict(2, pictures)[1]
    scores = sorted(row["scores"][0] for row in alone)
    assert min(high - low for low, high in pairwise(scores)) > 1e-3  # so that a mistaken row would show
    cfg = compose_config(words(2, pictures))

    def work(run):
        folder = tmp_path / f"rank{run.context.rank}"
        folder.mkdir()
        own = Run(folder, folder, "predict", run.context, Console(file=io.StringIO()), Loggers())
        return Predict(cfg, own).run().metrics, folder

    (metrics, first), (same, second) = over_ranks(2, work)
    assert metrics == same == {"images": 3, "skipped": 0} and not list(second.iterdir())
    rows = [json.loads(line) for line in (first / "predictions.jsonl").read_text().splitlines()]
    for row, expected in zip(rows, alone, strict=True):
        assert row["scores"] == pytest.approx(expected.pop("scores"), abs=1e-5)  # other batches, other rounding
        row.pop("scores")
        assert row == expected and (first / row["image"]).is_file()


def test_names_with_markup_and_brackets_are_shown_as_they_are(predict, pictures, capsys):
    (pictures / "a.png").rename(pictures / "[red]a[1].png")
    predict(2, pictures / "[red]a[1].png")
    assert re.search(r"\[red\]a\[1\]\.png: ", capsys.readouterr().out)


@pytest.fixture
def questions(tmp_path):
    """A file with two questions."""
    path = tmp_path / "questions.txt"
    path.write_text("which digit is on the left?\nwhich digit?\n")
    return path


FORM = "task.prompt='Question: {} Short answer:'"


def test_many_prompts_of_each_picture_which_is_encoded_once(predict, pictures, questions, encoded, tmp_path, browser):
    (pictures / "b.jpg").rename(pictures / "<b>, &.jpg")
    overrides = [f"task.prompts={questions}", FORM, "task.formats=[jsonl,csv,html]", "task.num_return_sequences=2"]
    metrics, rows = predict(2, pictures, overrides=overrides)
    assert metrics == {"images": 3, "skipped": 0, "prompts": 6} and sum(encoded) == 3
    assert [(row["source"], row["asked"]) for row in rows] == [
        (str(pictures / name), asked)
        for name in ("<b>, &.jpg", "a.png", "more/c.png")
        for asked in questions.read_text().splitlines()
    ]
    assert all(row["prompt"] == f"Question: {row['asked']} Short answer:" for row in rows)
    assert rows[0]["scores"] != rows[1]["scores"] and rows[0]["image"] == rows[1]["image"] != rows[2]["image"]

    folder = tmp_path / "outputs/p"
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["source"], line["asked"], line["prompt"], line["place"], line["text"]) for line in table] == [
        (row["source"], row["asked"], row["prompt"], str(place), text)
        for row in rows
        for place, text in enumerate(row["texts"], start=1)
    ]
    assert [float(line["score"]) for line in table] == [score for row in rows for score in row["scores"]]
    assert not (folder / "partial").exists()

    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((folder / "predictions.html").as_uri())
    assert page.locator("figure").count() == 3 and page.locator("p.asked").count() == 6 and page.locator("p.said").count() == 6
    assert page.locator("figure").first.inner_text().startswith(str(pictures / "<b>, &.jpg"))
    assert page.evaluate("[...document.images].every(i => i.src.startsWith('data:'))") and page.locator("img").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    page.close()


def test_a_conversation_about_each_picture(predict, pictures, questions, encoded, tmp_path, capsys):
    overrides = [f"task.prompts={questions}", FORM, "task.chat=true", "task.formats=[jsonl,html]"]
    _, rows = predict(2, pictures, overrides=overrides)
    assert sum(encoded) == 3
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (first["earlier"], second["earlier"]) == (0, 1)
        before = f"Question: which digit is on the left? Short answer: {first['texts'][0]}"
        assert second["prompt"].startswith(before) and second["prompt"].endswith(". Question: which digit? Short answer:")
        told = json.loads((tmp_path / "outputs/p" / second["conversation"]).read_text())
        assert told["source"] == first["source"] == second["source"] and first["conversation"] == second["conversation"]
        assert [(turn["question"], turn["answer"]) for turn in told["turns"]] == [
            (row["asked"], row["texts"][0]) for row in (first, second)
        ]
    alone = predict(2, pictures, overrides=[*overrides, "task.chat_tokens=14"])[1]
    assert [row["earlier"] for row in alone] == [0] * 6 and alone[1]["prompt"] == "Question: which digit? Short answer:"
    assert "3 questions were asked without the oldest turns" in capsys.readouterr().out


def test_a_question_that_leaves_no_room_is_told_before_any_picture_is_opened(predict, bad, tmp_path):
    (tmp_path / "long.txt").write_text("a\n" + "which digit " * 70)
    overrides = [f"task.prompts={tmp_path}/long.txt", FORM]
    with pytest.raises(UserError, match=r"long.txt: the longest prompt of \d+ tokens, 8 queries and .* make more than"):
        predict(2, bad / "empty.png", overrides=overrides)
    with pytest.raises(UserError, match=r"the longest prompt of \d+ tokens is longer than task.chat_tokens=20"):
        predict(2, bad / "empty.png", overrides=[*overrides, "task.chat=true", "task.chat_tokens=20"])


def test_a_run_that_was_killed_goes_on_without_the_pictures_that_are_done(predict, pictures, encoded, tmp_path, monkeypatch):
    words = ["task.eval_batch_size=1", "task.do_sample=true", "task.num_beams=1"]
    _, whole = predict(2, pictures, overrides=words)
    add, kept = Parts.add, []

    def killed(parts, rows):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(add(parts, rows))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Parts, "add", killed)
        predict(2, pictures, overrides=words)
    path = tmp_path / "outputs/p/partial/0.jsonl"
    path.write_text(path.read_text() + '{"source": "/half/of')
    assert not (tmp_path / "outputs/p/predictions.jsonl").exists()
    encoded.clear()
    metrics, rows = predict(2, pictures, overrides=[*words, "overwrite=false", "resume=auto"])
    assert metrics == {"images": 3, "skipped": 0} and rows == whole and not path.exists()
    assert len(encoded) == 1
    for row in rows:
        assert (tmp_path / "outputs/p" / row["image"]).is_file() and (tmp_path / "outputs/p" / row["attention"]).is_file()


def test_each_picture_is_asked_its_own_prompts(predict, pictures, server):
    (pictures / "asked.csv").write_text(f"image,prompt\nmore/c.png,a\n{server[0]}/a.png,b\nmore/c.png,which\n")
    _, rows = predict(2, overrides=[f"task.prompts={pictures}/asked.csv", "task.inputs=null"])
    assert [(row["source"], row["prompt"]) for row in rows] == [
        (f"{pictures}/more/c.png", "a"), (f"{pictures}/more/c.png", "which"), (f"{server[0]}/a.png", "b")
    ]  # fmt: skip


def test_settings_that_do_not_go_together_are_told_before_work(pictures, tmp_path):
    task = compose_config(["task=predict", f"task.inputs={pictures}"]).task
    (pictures / "asked.csv").write_text("image,prompt\nmore/c.png,a\n")
    (tmp_path / "lines.txt").write_text("a\n")
    own, lines = f"{pictures}/asked.csv", f"{tmp_path}/lines.txt"
    for changes, sentence in (
        ({"prompts": own}, r"names the picture of each prompt, so leave task.inputs out"),
        ({"prompts": lines, "inputs": None}, r"names no pictures; say which by task.inputs"),
        ({"prompts": lines, "prompt": "which digit"}, r"has no \{\} for the prompts"),
        ({"prompts": lines, "chat": True}, r"task.chat=true needs a form to write questions"),
        ({"prompts": lines, "stage": 1}, r"task.prompts=.* with task.stage=1: the Q-Former takes no prompt"),
        ({"prompts": lines, "chat_tokens": 0}, r"chat_tokens must be at least 1"),
        ({"chat": True}, r"task.chat=true needs the questions"),
        ({"prompt": "{}"}, r"no question to put there.*task.prompts=FILE"),
        ({"prompts": "/no/where.txt"}, r"/no/where.txt does not exist"),
        ({"formats": []}, r"would write nothing"),
    ):
        with pytest.raises(UserError, match=sentence):
            changed = replace(task, **changes)
            check_task(changed)
            pictures_and_prompts(changed)
    fine = replace(task, prompts=lines, prompt="{}", chat=True)
    check_task(fine)
    assert list(pictures_and_prompts(fine).values()) == [["a"]] * 3
