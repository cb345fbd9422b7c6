import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from blip2x.config.compose import compose_dict
from blip2x.engine.comparisons import TIMES
from blip2x.engine.report import shown_searches, write_report
from blip2x.errors import UserError

VOID = {"meta", "img", "link", "br", "hr", "input", "line", "circle", "polyline"}
SECTIONS = {
    "summary",
    "captions",
    "questions",
    "searches",
    "predictions",
    "types",
    "groups",
    "curves",
    "figures",
    "cost",
    "config",
}


class Page(HTMLParser):
    """A page's tags; fails on any that is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def sections(self) -> set[str]:
        return {attrs["id"] for tag, attrs in self.tags if tag == "section"}

    def images(self) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def caption(number: int, score: float | None, **other) -> dict:
    row = {"stage": "caption", "image_id": number, "group": "seen", "image": "images/small.png", "caption": f"caption {number}"}
    return {**row, "references": ["a red two"], "scores": {"CIDEr": score}, "blind": "a blue one", **other}


def question(number: int, correct: float | None, image_id: int = 1) -> dict:
    row = {
        "stage": "vqa_zeroshot",
        "question_id": number,
        "image_id": image_id,
        "group": "held_out",
        "image": "images/small.png",
    }
    texts = {
        "question": f"question {number}?",
        "question_type": "which digit",
        "answer_type": "other",
        "answers": ["two"],
        "prediction": "two",
    }
    return {**row, **texts, "blind": "seven", "correct": correct}


def searches(images: int, ranks: dict[int, int]) -> list[dict]:
    """Lines of a retrieval: `images` pictures with a text each; the right one first, or in the place that `ranks` says."""

    def found(number: int) -> list[int]:
        others, place = [(number + n) % images for n in range(1, min(10, images))], ranks.get(number, 1)
        return [*others[: place - 1], number, *others[place - 1 :]] if place <= len(others) else others

    def said(number: int, other: int) -> dict:
        return {"score": 1.5 - 0.1 * found(number).index(other), "similarity": 0.25, "right": other == number}

    def about(number: int) -> dict:
        return {"image_id": number, "name": f"{number}.png", "image": "images/small.png"}

    rows = []
    for way in ("retrieved_texts", "retrieved_images"):
        for number in range(images):
            row = {"stage": "retrieval", "group": "seen", "image_id": number, "rank": ranks.get(number, 1)}
            if way == "retrieved_texts":
                entries = [{"text": f"text {other}", **said(number, other)} for other in found(number)]
                rows.append({**row, **about(number), way: entries})
            else:
                entries = [{**about(other), **said(number, other)} for other in found(number)]
                rows.append({**row, "text": f"text {number}", way: entries})
    return rows


@pytest.fixture
def run_folder(tmp_path) -> Path:
    folder = tmp_path / "my-run"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (48, 48), "red").save(folder / "images/small.png")
    Image.effect_noise((600, 400), 90).save(folder / "images/photo.png")
    results = {
        "pretrain_stage1": {"i2t_recall@1": 0.41, "t2i_recall@1": 0.39, "chance": 0.0025},
        "caption": {"CIDEr": 2.1, "blind_CIDEr": 0.3, "held_out/CIDEr": 1.5},
        "vqa_zeroshot": {
            "accuracy": 71.0,
            "blind_accuracy": 35.2,
            "ci95_low_accuracy": 69.5,
            "ci95_high_accuracy": 72.5,
            "accuracy/question_type/which digit": 60.0,
            "accuracy/answer_type/other": 61.0,
            "ci95_low_accuracy/answer_type/other": 58.5,
            "ci95_high_accuracy/answer_type/other": 63.0,
            "held_out/accuracy": float("nan"),
        },
        "seconds": 280.1,
        "peak_memory_gb": 1.2,
    }
    (folder / "results.json").write_text(json.dumps(results))
    stages = [{"task": "pretrain_stage1"}, {"task": "caption"}, {"task": "vqa_zeroshot"}]
    config = {
        "task": {"kind": "pipeline", "stages": stages},
        "model": {"name": "tiny_opt"},
        "dataset": {"name": "digits"},
        "seed": 3,
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "command.txt").write_text("python runners/run.py\n")
    (folder / "versions.json").write_text('{"blip2x": "0.1.0", "paddlepaddle-gpu": null}')
    steps = [
        {"stage": "pretrain_stage1", "step": n, "lr": 1e-4, "loss": 9 / n, "itc": 5 / n, "seconds": n / 2.0}
        for n in range(1, 9)
    ]
    write_lines(folder / "metrics.jsonl", [*steps, {"stage": "pretrain_stage1", "step": 9, "loss": float("nan")}])
    predict = {
        "stage": "predict",
        "source": "me.jpg",
        "image": "images/photo.png",
        "prompt": "a",
        "texts": ["b"],
        "scores": [-1.0],
    }
    rows = [caption(1, 3.0), caption(2, None, image=None), question(1, 1.0), question(2, 0.0), question(3, 0.3), predict]
    write_lines(folder / "predictions.jsonl", [*rows, *searches(2, {})])
    return folder


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_a_whole_run_has_every_section_and_nothing_from_elsewhere(run_folder):
    text = report(run_folder)
    page = Page(text)
    assert page.sections() == SECTIONS
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} == SECTIONS
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images())
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_metrics_stand_beside_their_baselines(run_folder):
    text = report(run_folder)
    for words in (
        f"<b>164{TIMES}</b> chance",
        f"<b>7.0{TIMES}</b> the score without the picture",
        "<b>+35.8 points</b>",
        "4 min 40 s",
    ):
        assert words in text
    assert re.search(r'<div class="bar"><span>no picture</span><i><u style="width:35.2%">', text)
    assert "not a number" in text


def test_values_have_their_intervals_in_brackets(run_folder):
    text = report(run_folder)
    assert text.count("[69.5, 72.5]") == 3  # in the summary, among the groups and among all figures
    assert "95 % of the values" in text and "ci95" not in text


def test_accuracies_by_type_of_question_and_of_answer_have_their_counts(run_folder):
    types = report(run_folder).split('<section id="types">')[1].split("</section>")[0]
    by_question, by_answer = types.split("By answer type")
    assert re.search(r'which digit</th><td class="n wide">3</td>.*?60\.0 %', by_question, re.DOTALL)
    assert re.search(r'other</th><td class="n wide">3</td>.*?61\.0 %.*?\[58\.5, 63\.0\]', by_answer, re.DOTALL)


def test_groups_of_any_name_stand_beside_all(run_folder):
    domains = {f"{domain}/CIDEr": value for domain, value in (("in-domain", 1.2), ("near-domain", 1.1), ("out-domain", 1.0))}
    (run_folder / "results.json").write_text(json.dumps({"caption": {"CIDEr": 1.1, "images": 3, **domains}}))
    groups = report(run_folder).split('<section id="groups">')[1].split("</section>")[0]
    assert re.findall(r'<th scope="col" class="n">(.*?)</th>', groups) == ["all", "in-domain", "near-domain", "out-domain"]
    assert "never occurred in training" not in groups


def test_the_same_files_give_the_same_page_and_no_partial_file_stays(run_folder):
    assert report(run_folder) == report(run_folder)
    assert not [path for path in run_folder.iterdir() if "partial" in path.name]


def test_an_old_report_survives_a_failure(run_folder, monkeypatch):
    old = report(run_folder)
    monkeypatch.setattr("blip2x.engine.report.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    (run_folder / "command.txt").write_text("another")
    with pytest.raises(OSError, match="disk full"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_text(encoding="utf-8") == old


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("metrics.jsonl", {"curves"}),
        ("predictions.jsonl", {"captions", "questions", "searches", "predictions"}),
        ("results.json", {"summary", "types", "groups", "figures"}),
        ("config.yaml", {"config"}),
        ("command.txt", set()),
    ],
)
def test_what_is_missing_is_left_out(run_folder, missing, sections):
    (run_folder / missing).unlink()
    assert Page(report(run_folder)).sections() == SECTIONS - sections


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder: it has neither"):
        write_report(tmp_path)


def test_text_of_models_and_users_is_escaped(run_folder):
    evil = "<script>alert('x')</script>"
    row = caption(1, 1.0, caption=evil, blind=evil, references=[evil], group=evil, image_id=evil)
    asked = {**question(1, 0.0), "question": evil, "prediction": evil, "answers": [evil], "blind": evil}
    shown = {"stage": evil, "source": evil, "image": None, "prompt": evil, "texts": [evil], "scores": []}
    sought = [{**line, "text": evil, "group": evil, "image_id": evil, "rank": evil} for line in searches(2, {})]
    for line in sought:
        for entry in [*line.get("retrieved_texts", []), *line.get("retrieved_images", [])]:
            entry |= {"text": evil, "name": evil, "score": evil}
    write_lines(run_folder / "predictions.jsonl", [row, asked, shown, *sought])
    write_lines(run_folder / "metrics.jsonl", [{"stage": evil, "step": 1, evil: 1.0}])
    (run_folder / "command.txt").write_text(evil)
    (run_folder / "config.yaml").write_text(f'run_name: "{evil}"')
    (run_folder / "results.json").write_text(json.dumps({evil: {evil: 1.0, f"accuracy/{evil}": 1.0}}))
    text = report(run_folder)
    Page(text)
    assert "<script" not in text.lower() and text.count("&lt;script&gt;") > 10


def test_right_and_wrong_are_told_in_words(run_folder):
    text = report(run_folder)
    for sign, word in (("✓", "right"), ("✗", "wrong"), ("◐", "partly right, 0.30")):
        assert f'<span aria-hidden="true">{sign}</span> {word}</span>' in text


def test_questions_are_grouped_by_picture(run_folder):
    rows = [question(number, 1.0, image_id=number % 2) for number in range(6)]
    write_lines(run_folder / "predictions.jsonl", rows)
    page = Page(report(run_folder))
    assert len(page.images()) == 2
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "ul"] == ["qa", "qa"]


def test_best_worst_and_random_say_how_they_were_chosen(run_folder):
    write_lines(
        run_folder / "predictions.jsonl", [caption(number, number / 10) for number in range(40)] + [caption(99, float("nan"))]
    )
    text = report(run_folder)
    assert "8 of 41 captioned pictures, drawn at random" in text
    best, worst = text[text.index("The 4 best of 40") :].split("The 4 worst of 40")
    assert re.findall(r'"said">caption (\d+)', best) == ["39", "38", "37", "36"]
    assert re.findall(r'"said">caption (\d+)', worst.split("</section>")[0]) == ["0", "1", "2", "3"]


def test_random_pictures_are_drawn_from_those_that_were_kept(run_folder):
    kept = range(0, 400, 20)
    rows = [caption(number, 1.0, image="images/small.png" if number in kept else None) for number in range(400)]
    write_lines(run_folder / "predictions.jsonl", rows)
    text = report(run_folder)
    assert "8 of 400 captioned pictures, drawn at random from the 20 that copies were kept of" in text
    drawn = re.findall(r'"said">caption (\d+)', text.split("The 4 best")[0])
    assert len(drawn) == 8 and all(int(number) in kept for number in drawn)


def test_pictures_with_questions_are_chosen_by_the_mean_of_their_answers(run_folder):
    rows = [question(10 * number + n, float(number > n), image_id=number) for number in range(13) for n in range(2)]
    write_lines(run_folder / "predictions.jsonl", [*rows, question(999, None, image_id=99)])
    text = report(run_folder)
    assert (
        "6 of 14 pictures with questions, drawn at random" in text and "? not scored" not in text.split("The 3 best of 13")[1]
    )
    best, worst = text[text.index("The 3 best of 13") :].split("The 3 worst of 13")
    assert re.findall(r'"which">picture (\d+)', best) == ["2", "3", "4"]
    assert re.findall(r'"which">picture (\d+)', worst.split("</section>")[0])[:3] == ["0", "1", "2"]


def test_small_scenes_stay_sharp_and_photographs_are_embedded_small(run_folder):
    classes = {image["class"]: image["src"] for image in Page(report(run_folder)).images()}
    kind, data = classes["photo"].split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (480, 320)
    assert base64.b64decode(classes["small"].split(",")[1]) == (run_folder / "images/small.png").read_bytes()


@pytest.mark.parametrize("image", ["../secret.png", "images/broken.png", "images/none.png", "images"])
def test_no_picture_from_outside_and_none_that_cannot_be_read(run_folder, image):
    Image.new("RGB", (48, 48)).save(run_folder.parent / "secret.png")
    (run_folder / "images/broken.png").write_bytes((run_folder / "images/photo.png").read_bytes()[:3000])
    write_lines(run_folder / "predictions.jsonl", [caption(1, 1.0, image=image)])
    text = report(run_folder)
    assert Page(text).images() == [] and "no picture kept" in text


def test_predictions_of_stages_are_found_in_their_folders(run_folder):
    (run_folder / "caption/images").mkdir(parents=True)
    Image.new("RGB", (48, 48), "blue").save(run_folder / "caption/images/7.png")
    write_lines(run_folder / "caption/predictions.jsonl", [caption(7, 1.0, image="images/7.png", caption="from the stage")])
    (run_folder / "predictions.jsonl").unlink()
    text = report(run_folder)
    assert "from the stage" in text and len(Page(text).images()) == 1


def test_lines_that_cannot_be_read_are_counted(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "pretrain_st')
    assert "metrics.jsonl: 1 line could not be read and were left out." in report(run_folder)


def test_what_no_run_writes_keeps_no_page_from_being_written(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + '{"stage": "caption", "step": 9, "loss": 1' + "0" * 400 + "}\n")
    with (run_folder / "predictions.jsonl").open("a") as file:
        for row in (caption(99, None, scores=[1]), {"stage": "predict", "source": ["a"], "texts": ["x"], "scores": [0]}):
            file.write(json.dumps(row) + "\n")
    text = report(run_folder)
    assert "metrics.jsonl: 1 line could not be read" in text and "[&#39;a&#39;]" in text


def test_values_that_are_no_number_are_counted_beside_the_curve(run_folder):
    assert "1 value not a finite number" in report(run_folder)


def test_a_line_separator_inside_a_text_ends_no_line(run_folder):
    row = json.dumps(caption(1, 1.0, caption="one\u2028two"), ensure_ascii=False)
    (run_folder / "predictions.jsonl").write_text(row + "\n", encoding="utf-8")
    text = report(run_folder)
    assert "one\u2028two" in text and "could not be read" not in text


SCHEDULE = {
    "stage": "pretrain_stage1",
    "lr": 1e-4,
    "warmup_start_lr": 1e-6,
    "warmup_steps": 4,
    "eta_min": 1e-5,
    "total_steps": 20,
}


def rate_panel(text: str) -> str:
    return re.search("<h4>learning rate</h4>(.*?)</svg>", text, re.DOTALL)[1]


@pytest.mark.parametrize("folder", ["", "pretrain_stage1"])
def test_the_planned_rate_is_drawn_with_the_logged_one(run_folder, folder):
    """Of the run itself, or of a stage in its folder; planned to the end, even where the run was broken off."""
    (run_folder / folder).mkdir(exist_ok=True)
    (run_folder / folder / "schedule.json").write_text(json.dumps(SCHEDULE))
    panel = rate_panel(report(run_folder))
    assert "plan: 1e-06 at step 1, 1.086e-05 at step 20" in panel and "logged: 0.0001 at step 1, 0.0001 at step 8" in panel
    assert panel.count("<circle") == 1 + 8 and panel.count("<polyline") == 1


@pytest.mark.parametrize("content", [{**SCHEDULE, "stage": "another"}, {"stage": "pretrain_stage1", "lr": 1}, "x", None])
def test_without_a_plan_the_logged_rate_is_a_line(run_folder, content):
    if content is not None:
        (run_folder / "schedule.json").write_text(json.dumps(content))
    assert "<polyline" in rate_panel(report(run_folder)) and "plan:" not in rate_panel(report(run_folder))


def search_section(folder: Path) -> list[str]:
    """The page's searches by a picture and by a text."""
    _, by_picture, by_text = report(folder).split('<section id="searches">')[1].split("</section>")[0].split("<h3>")
    return [by_picture, by_text]


def test_searches_show_what_came_first_and_mark_what_is_right(run_folder):
    write_lines(run_folder / "predictions.jsonl", searches(3, {1: 2}))
    by_picture, by_text = search_section(run_folder)
    for text in (by_picture, by_text):
        assert "All 3 searches by a" in text and "best first" in text and text.count("</span> right</span>") == 3
    cards = by_picture.split('<div class="card">')[1:]
    assert "picture 1 " in cards[-1]  # the one whose own text came second
    assert re.findall(r"<p>(text \d)</p>|</span> (right)</span>|score (\d\.\d+)", cards[-1]) == [
        ("text 2", "", ""), ("", "", "1.50"), ("text 1", "", ""), ("", "right", ""), ("", "", "1.40"),
        ("text 0", "", ""), ("", "", "1.30"),
    ]  # fmt: skip
    cards = by_text.split('<div class="card">')[1:]
    assert re.findall(r'"said">text (\d)', by_text)[-1] == "1" and cards[-1].count("<img") == 3
    assert re.findall(r"<li( class=\"hit\")?>", cards[-1]) == ["", ' class="hit"', ""]


def test_what_a_failed_search_should_have_found_is_told(run_folder):
    write_lines(run_folder / "predictions.jsonl", searches(20, {7: 15}))
    by_picture, by_text = (text.split("<h4>Worst</h4>")[1] for text in search_section(run_folder))
    first = by_picture.split('<div class="card">')[1]
    assert "picture 7 " in first and first.count("score") == 5 and "</span> right</span>" not in first
    assert re.search(r'first right one in place 15; its own are</small></p><p class="own">text 7</p>', first)
    first = by_text.split('<div class="card">')[1]
    assert '"said">text 7<' in first and first.count("<img") == 6
    assert re.search(r'<li class="own">.*<small>place 15</small> <span class="mark right">', first, re.DOTALL)


def test_searches_are_the_best_the_worst_and_some_at_random(run_folder):
    write_lines(run_folder / "predictions.jsonl", searches(60, {5: 2, 50: 9, 40: 8, 30: 7}))
    for text in search_section(run_folder):
        assert "6 of 60 searches by a" in text
        best, worst = text[text.index("The 3 best of 60") :].split("The 3 worst of 60")
        assert "ties drawn at random" in best and re.findall(r'"which">(?:of )?picture (\d+)', worst) == ["50", "40", "30"]
        shown = re.findall(r'"which">(?:of )?picture (\d+)', best)
        assert len(shown) == 3 and shown != ["0", "1", "2"] and "first right" not in best.split("</p>", 1)[1]


def test_the_pictures_of_searches_can_be_kept_before_any_is(run_folder):
    """The choice is the same whether or not there are copies."""
    rows = searches(60, {5: 2, 50: 9})
    bare = [{**row, "image": None} if "image" in row else row for row in rows]
    chosen, again = ([[row["image_id"] for row in group.items] for groups in shown_searches(lines).values() for group in groups]
                     for lines in (rows, bare))  # fmt: skip
    assert chosen == again and [len(ids) for ids in chosen] == [6, 3, 3] * 2
    assert shown_searches([row for row in rows if "retrieved_texts" in row]).keys() == {"retrieved_texts"}
    assert shown_searches([]) == {}


@pytest.fixture
def attended(run_folder) -> Path:
    """The run with pictures of where the queries look: of a caption's and of a question's picture."""
    rows = [json.loads(line) for line in (run_folder / "predictions.jsonl").read_text().splitlines()]
    Image.effect_noise((300, 300), 90).convert("RGB").save(run_folder / "images/looks.jpg", quality=60)
    for row in rows:
        if row.get("image") and ("caption" in row or "question" in row):
            row["attention"] = "images/looks.jpg"
    write_lines(run_folder / "predictions.jsonl", rows)
    return run_folder


def test_where_the_queries_look_folds_out_under_the_picture(attended):
    page = Page(report(attended))
    assert len([image for image in page.images() if image["alt"] == "Where the queries look"]) == 2
    assert "where the queries look</summary>" in report(attended)


def test_a_page_has_so_much_attention_and_no_more(attended, monkeypatch):
    size = (attended / "images/looks.jpg").stat().st_size
    monkeypatch.setattr("blip2x.engine.report.ATTENTION_BYTES", 2 * size)  # one, which is a third longer in base64
    text = report(attended)
    assert text.count("where the queries look</summary>") == 1
    assert "1 picture of attention is left out" in text


def test_a_run_that_failed_says_so_first_and_shows_what_it_left(run_folder):
    for name in ("results.json", "predictions.jsonl"):
        (run_folder / name).unlink()
    error = "pretrain_stage1: the loss is <nan> at step 9"
    (run_folder / "status.json").write_text(json.dumps({"state": "failed", "error": error, "ended": "2026-01-02T03:04:05Z"}))
    text = report(run_folder)
    assert Page(text).sections() == {"curves", "cost", "config"}
    banner = text.split('<div class="unfinished">')[1].split("</div>")[0]
    assert "failed</span> pretrain_stage1: the loss is &lt;nan&gt; at step 9" in banner and "step 9." in banner
    assert "2026-01-02 03:04 UTC" in text


def test_a_complete_run_says_nothing_of_the_kind(run_folder):
    (run_folder / "status.json").write_text('{"state": "complete", "error": null}')
    assert 'class="unfinished"' not in report(run_folder)


def test_confusion_has_counts_shares_and_a_frame(run_folder):
    rows = [{**question(n, 1.0), "answers": ["two" if n % 4 else "six"], "prediction": "two"} for n in range(40)]
    write_lines(run_folder / "predictions.jsonl", rows)
    section = report(run_folder).split('<section id="confusion">')[1].split("</section>")[0]
    assert "which digit <small>40 questions</small>" in section
    cells = re.findall(r"<td( class=\"same\")? style=\"--share:([\d.]+)\">(\d+)<small>(\d+)</small>", section)
    assert cells == [(' class="same"', "1.000", "30", "100"), ("", "1.000", "10", "100")]


def test_the_difference_from_the_defaults_or_why_it_is_not_known(run_folder):
    assert "cannot be told: the run has other keys at the top" in report(run_folder)
    composed = compose_dict(["seed=7", "run_name=my-run"])
    (run_folder / "config.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
    section = report(run_folder).split('<section id="config">')[1]
    assert '<th scope="row">seed</th><td>42</td><td>7</td>' in section and section.count('<th scope="row">') == 1
    assert "python runners/run.py task=pipeline model=tiny_opt dataset=digits</code> and nothing else" in section


def test_long_diffs_are_cut(run_folder):
    (run_folder / "diff.patch").write_text("\n".join(f"+<line {n}>" for n in range(500)))
    text = report(run_folder)
    assert "+&lt;line 399&gt;\n[100 more lines in diff.patch]" in text


@pytest.fixture
def whole(attended) -> Path:
    """A run with all that a page can show; its folder."""
    (attended / "status.json").write_text('{"state": "failed", "error": "the disk is full"}')
    (attended / "hardware.json").write_text('{"cpu": "Xeon", "cores": 2}')
    (attended / "diff.patch").write_text("+" + "x" * 300)
    with (attended / "predictions.jsonl").open("a") as file:
        for n in range(60):
            said = {"answers": [f"answer {n % 12}"], "prediction": f"answer {n * n % 12}"}
            file.write(json.dumps({**question(100 + n, 0.0, image_id=n), **said}) + "\n")
    write_report(attended)
    return attended


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_a_real_browser_shows_it_whole(whole, browser, width, scheme):
    """By day and night, on a phone and a desktop: nothing from outside, nothing that sticks out, texts that can be read."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))

    def only_files(route):
        asked.append(route.request.url)
        route.continue_() if route.request.url.startswith(("file:", "data:")) else route.abort()

    page.route("**/*", only_files)
    page.goto((whole / "report.html").as_uri())
    assert page.title() == "my-run \u00b7 blip2x"
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 10
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and said == []
    for link in page.query_selector_all("nav a"):
        target = link.get_attribute("href")
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        link.click()
        top = page.evaluate("id => document.querySelector(id).getBoundingClientRect().top", target)
        at_end = page.evaluate("Math.ceil(scrollY + innerHeight) >= document.documentElement.scrollHeight")
        assert abs(top) < 40 or (at_end and top > 0), target
    assert [(words, ratio) for words, ratio in page.evaluate(CONTRASTS) if ratio < 4.5] == []
    page.close()


# every element with text of its own: its colour against the colours that lie under it, by WCAG's formula
CONTRASTS = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1] }
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]))
  const light = colour => colour.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0)
  const under = element => {
    if (!element) return [255, 255, 255]
    const own = parse(getComputedStyle(element).backgroundColor)
    return own[3] === 1 ? own.slice(0, 3) : over(own, under(element.parentElement))
  }
  return [...document.body.querySelectorAll('*')]
    .filter(each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()) && each.tagName !== 'title')
    .map(each => {
      const svg = each.namespaceURI.includes('svg'), style = getComputedStyle(each)
      const back = under(svg ? each.closest('svg').parentElement : each)
      const [low, high] = [light(over(parse(svg ? style.fill : style.color), back)), light(back)].sort((a, b) => a - b)
      return [each.tagName + '.' + each.getAttribute('class') + ' ' + each.textContent.slice(0, 40), (high + .05) / (low + .05)]
    })
}"""


def test_the_contrast_test_can_fail(browser):
    page = browser.new_page()
    page.set_content("<body style='background:#fff'><p style='color:#777'>grey</p><p style='color:#767676'>just enough</p>")
    assert [round(ratio, 2) for _, ratio in page.evaluate(CONTRASTS)] == [4.48, 4.54]
    page.close()
