"""Made-up run folders set beside one another; nothing here needs paddle."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from blip2x.engine import compare
from blip2x.engine.compare import Comparison, find_runs, write_comparison
from blip2x.engine.compared import plots
from blip2x.engine.compared.differences import shortened
from blip2x.errors import UserError


def make(folder: Path, *, words: str = "", state: str | None = "complete", error: str = "", **values) -> Path:
    """A run's folder; `values` may be config, results, log (lines of metrics.jsonl) and versions."""
    folder.mkdir(parents=True)
    config = {"task": {"kind": "caption"}, "seed": 1, "run_name": folder.name, **values.get("config", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "command.txt").write_text(f"runners/run.py {words}\n")
    if state:
        (folder / "status.json").write_text(
            json.dumps({"state": state, "error": error or None, "started": None, "ended": None})
        )
    if "results" in values:
        (folder / "results.json").write_text(json.dumps(values["results"]))
    if "log" in values:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values["log"]))
    if "versions" in values:
        (folder / "versions.json").write_text(json.dumps(values["versions"]))
    return folder


def cider(value: float, half: float = 0.1, **others) -> dict:
    scores = {"CIDEr": value, "ci95_low_CIDEr": value - half, "ci95_high_CIDEr": value + half}
    return {"caption": scores, "seconds": 10.0, "peak_memory_gb": 1.5, **others}


def sweep(folder: Path) -> Path:
    """Three learning rates, and one run that failed."""
    for lr, score in ((1e-5, 1.0), (1e-4, 1.5), (1e-3, 1.45)):
        log = [{"stage": "caption", "step": step, "lr": lr, "loss": score / step} for step in (1, 2, 3)]
        make(folder / f"lr={lr}", config={"optim": {"lr": lr}}, words=f"optim.lr={lr}", results=cider(score), log=log)
    log = [{"stage": "caption", "step": 2, "lr": 1e-2, "loss": 9.0}, {"stage": "caption", "step": 2, "CIDEr": 9.9}]
    make(folder / "lr=0.01", config={"optim": {"lr": 1e-2}}, state="failed", error="the loss is nan at step 3", log=log)
    return folder


def written(runs: Path) -> tuple[str, str, dict]:
    console = Console(file=io.StringIO(), width=120)
    page = write_comparison(find_runs(str(runs)), runs, console)
    return console.file.getvalue(), page.read_text(), json.loads((runs / "comparison.json").read_text())


def test_runs_are_found_by_folder_list_and_pattern(tmp_path, monkeypatch):
    for name in ("a", "sweeps/one/x", "b/c"):
        make(tmp_path / name)
    make(tmp_path / "mine", config={"task": {"kind": "compare"}})
    (tmp_path / "a" / "caption").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_runs(".")] == ["a", "b/c"]  # two levels down, not three; no comparison
    assert [str(path) for path in find_runs("sweeps")] == ["sweeps/one/x"]
    assert [str(path) for path in find_runs(["b/c", "a", "./a"])] == ["b/c", "a"]
    assert [str(path) for path in find_runs("[ab]")] == ["a", "b/c"]
    with pytest.raises(UserError, match="runs=gone does not exist"):
        find_runs(["a", "gone"])
    with pytest.raises(UserError, match=r"no run in z\*, mine: a run's folder has"):
        find_runs(["z*", "mine"])


def test_a_folder_that_cannot_be_read_is_told_and_left_out(tmp_path, monkeypatch):
    make(tmp_path / "a")
    (tmp_path / "closed").mkdir()
    scandir = compare.os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(compare.os, "scandir", refuse)
    console = Console(file=io.StringIO(), width=200)
    assert find_runs(str(tmp_path), console) == [tmp_path / "a"]
    assert console.file.getvalue() == f"warning: {tmp_path}/closed cannot be read: Permission denied\n"
    with pytest.raises(UserError, match=r"levels below; .*closed cannot be read: Permission denied"):
        find_runs(str(tmp_path / "closed"))


def test_a_setting_that_is_no_finite_number_is_null_in_json(tmp_path):
    make(tmp_path / "a", config={"optim": {"clip": math.inf}}, results=cider(1.0))
    make(tmp_path / "b", config={"optim": {"clip": 1.0}}, results=cider(2.0))
    _, page, data = written(tmp_path)
    assert [run["differs"] for run in data["runs"]] == [{"optim.clip": 1.0}, {"optim.clip": None}] and "inf" in page
    assert "Infinity" not in (tmp_path / "comparison.json").read_text()


def test_a_sweep_says_what_differed_and_what_is_best(tmp_path):
    printed, page, data = written(sweep(tmp_path))
    assert max(map(len, printed.splitlines())) <= 120
    assert printed.index("lr=0.0001") < printed.index("lr=0.001") < printed.index("lr=1e-05") < printed.index("(9.90)")
    assert "lr=0.01: the loss is nan at step 3" in printed
    assert "1.45 \u2248" in printed and "1.00 \u2248" not in printed  # [1.35, 1.55] and [1.4, 1.6] overlap
    assert data["best"] == {"caption/CIDEr": ["lr=0.0001"]}  # 9.9 is of a run that did not finish
    assert [run["differs"] for run in data["runs"]] == [{"optim.lr": lr} for lr in (1e-4, 1e-3, 1e-5, 1e-2)]
    assert "<b>1.50</b>" in page and "<b>1.45</b>" not in page and 'title="not final">(9.90)' in page
    assert "lr (log scale)" in page and "the loss is nan at step 3" in page and 'class="s0"' in page
    row = next(csv.DictReader((tmp_path / "comparison.csv").open()))
    keys = ("optim.lr", "caption/CIDEr", "caption/CIDEr ci95_low", "state")
    assert [row[key] for key in keys] == ["0.0001", "1.5", "1.4", "complete"]
    assert written(tmp_path)[1] == page  # the same files, the same page


def test_best_is_printed_bold(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    write_comparison(find_runs(str(sweep(tmp_path))), tmp_path, console)
    assert re.findall(r"\x1b\[1m *([\d.]+)", console.file.getvalue()) == ["1.50"]


def test_rates_and_times_have_their_ratio_to_the_best(tmp_path):
    for batch, rate in ((4, 10.0), (8, 25.0)):
        overrides = [f"task.weights_dtype={'int8' if batch == 8 else 'float32'}"]
        results = {"caption": {"images_per_second": rate, "step_seconds": batch / rate, "step_seconds/part/vision": 1 / rate}}
        make(tmp_path / f"batch={batch}", config={"task": {"kind": "benchmark", "overrides": overrides}}, results=results)
    printed, page, _ = written(tmp_path)
    assert re.search("batch=8 +int8 +25.0 ", printed) and re.search("batch=4 +float32 +10.0 0.40\u00d7", printed)
    assert "\u00d7 the best" in printed
    ratios = re.findall(r"([\d.]+)&times;</small>", page)
    assert ratios == ["0.40", *ratios[1:]] and {"1.25", "2.50"} <= set(ratios)  # a step; its image encoder


def test_scores_have_no_ratio(tmp_path):
    sweep(tmp_path)
    assert "\u00d7" not in written(tmp_path)[0]


def test_seeds_are_put_together(tmp_path):
    for beams in (1, 5):
        for seed in (1, 2, 3):
            config = {"seed": seed, "optim": {"lr": beams}}
            make(tmp_path / f"{beams}-{seed}", config=config, results=cider(beams + seed / 10))
    make(tmp_path / "5-4", config={"seed": 4, "optim": {"lr": 5}}, state="interrupted", results={"caption": {"CIDEr": 99}})
    _, page, data = written(tmp_path)
    means = [group["metrics"]["CIDEr"] for group in data["seeds"]]
    assert [(m["mean"], m["standard_deviation"], m["runs"]) for m in means] == [
        (pytest.approx(1.2), pytest.approx(0.1), 3),
        (pytest.approx(5.2), pytest.approx(0.1), 3),
    ]
    assert "<b>5.20 \u00b1 0.100 (3)</b>" in page and "1.20 \u00b1 0.100 (3)" in page


def test_neither_repeats_nor_figures_that_are_not_final_count_over_seeds(tmp_path):
    for name, seed, results in (
        ("a", 1, cider(1.0)),
        ("a-again", 1, cider(1.0)),
        ("b", 2, cider(2.0, seconds=99.0, starts=2)),  # of the last start only
    ):
        make(tmp_path / name, config={"seed": seed}, results=results)
    (group,) = written(tmp_path)[2]["seeds"]
    figures = group["metrics"]["CIDEr"]
    assert len(group["runs"]) == figures["runs"] == 2
    assert (figures["mean"], figures["standard_deviation"]) == (1.5, pytest.approx(0.5**0.5))
    assert (group["metrics"]["seconds"]["mean"], group["metrics"]["seconds"]["runs"]) == (10.0, 1)


def test_one_seed_has_no_table_of_seeds(tmp_path):
    make(tmp_path / "a", config={"seed": 1, "optim": {"lr": 1}}, results=cider(1))
    make(tmp_path / "b", config={"seed": 2, "optim": {"lr": 2}}, results=cider(2))
    assert written(tmp_path)[2]["seeds"] == []


def test_states_and_broken_files_cost_a_note(tmp_path):
    make(tmp_path / "good", results=cider(1.0), versions={"numpy": "1", "git_commit": "a" * 40})
    make(tmp_path / "killed", state="running", log=[{"stage": "caption", "step": 5, "CIDEr": 0.5, "eval_loss": None}])
    make(tmp_path / "pruned", state="pruned", versions={"numpy": "2", "git_commit": "a" * 40})
    make(tmp_path / "old", state=None, results=cider(2.0))  # of before there was a status.json
    make(tmp_path / "open", state=None, results={"caption": {"CIDEr": 1}})
    broken = make(tmp_path / "broken")
    (broken / "config.yaml").write_bytes(b"task: [\xff")
    (broken / "results.json").write_text("{")
    (broken / "status.json").write_text("[]")
    (broken / "metrics.jsonl").write_text('{"stage": "caption", "st\n7\n{"stage": 1}\n')
    _, page, data = written(tmp_path)
    states = {run["run"]: run["state"] for run in data["runs"]}
    assert states == {"good": "complete", "old": "complete", "killed": "running, or killed", "pruned": "pruned",
                      "open": "not finished", "broken": "not finished"}  # fmt: skip
    assert data["best"]["caption/CIDEr"] == ["old"]
    assert set(data["versions"]) == {"numpy"} and "1 (1 run), 2 (1 run)" in page
    notes = next(run["notes"] for run in data["runs"] if run["run"] == "broken")
    assert [note.split()[0] for note in notes] == ["config.yaml", "results.json", "status.json", "metrics.jsonl:"]


def test_what_an_option_brings_along_goes_with_its_name_unless_it_was_typed(tmp_path):
    def model(name: str, width: int, queries: int) -> dict:
        return {"model": {"name": name, "language": {"width": width}, "qformer": {"num_queries": queries}}}

    make(tmp_path / "a", config=model("opt", 96, 8), results=cider(1))
    make(tmp_path / "b", config=model("t5", 128, 16), results=cider(2), words="model=t5 model.qformer.num_queries=16")
    keys = {key.name: key for key in Comparison.of(find_runs(str(tmp_path))).keys}
    assert (keys["model.name"].title, keys["model.name"].lead) == ("model", None)
    assert keys["model.language.width"].lead == "model.name" and keys["model.qformer.num_queries"].lead is None
    assert "run_name" not in keys


def test_stages_of_pipelines_are_compared_by_their_overrides(tmp_path):
    for name, lr in (("a", "1e-4"), ("b", "0.001")):
        stages = [{"task": "caption", "name": None, "overrides": [f"optim.lr={lr}", "task.num_beams=3"]}]
        make(tmp_path / name, config={"task": {"kind": "pipeline", "stages": stages, "overrides": [name]}}, results=cider(1))
    (key,) = Comparison.of(find_runs(str(tmp_path))).keys
    assert (key.name, key.values) == ("caption.optim.lr", ("0.0001", "0.001"))


def test_one_task_each_is_compared_by_metric(tmp_path):
    make(tmp_path / "a", config={"task": {"kind": "vqa_zeroshot"}}, results={"vqa_zeroshot": {"accuracy": 50.0}, "seconds": 1})
    make(tmp_path / "b", config={"task": {"kind": "vqa_finetune"}}, results={"vqa_finetune": {"accuracy": 70.0}, "seconds": 3})
    assert written(tmp_path)[2]["best"] == {"accuracy": ["b"], "cost/seconds": ["a"]}


def test_seconds_of_a_resumed_run_are_not_the_best(tmp_path):
    make(tmp_path / "a", results=cider(1, seconds=1.0, starts=2))
    make(tmp_path / "b", results=cider(2, seconds=5.0))
    make(tmp_path / "c", results=cider(3, seconds=6.0))
    assert written(tmp_path)[2]["best"]["cost/seconds"] == ["b"]


def test_two_keys_make_a_table_with_a_field_per_pair(tmp_path):
    for lr in (1, 2):
        for beams in (3, 4):
            config = {"optim": {"lr": lr}, "task": {"kind": "caption", "num_beams": beams}}
            make(tmp_path / f"{lr}-{beams}", config=config, results=cider(lr + beams))
    found = Comparison.of(find_runs(str(tmp_path)))
    (heat,) = plots.metric_plots(found.runs, found.keys, found.columns)
    assert isinstance(heat, plots.HeatTable) and (heat.row_key, heat.column_key) == ("num_beams", "lr")
    assert heat.column_names == ["1", "2"] and [name for name, _ in heat.rows] == ["3", "4"]
    assert [[field[2] for field in fields] for _, fields in heat.rows] == [[False, False], [False, True]]
    assert heat.rows[0][1][0][1] == 0.0 and heat.rows[1][1][1][1] == 1.0


def test_three_keys_make_a_plot_each(tmp_path):
    for index in range(4):
        config = {"optim": {"lr": index + 0.5, "beta1": 1 / (index + 1), "eps": (3 * index) % 4}}
        make(tmp_path / str(index), config=config, results=cider(index))
    found = Comparison.of(find_runs(str(tmp_path)))
    titles = [panel.title for panel in plots.metric_plots(found.runs, found.keys, found.columns)]
    assert titles == ["CIDEr by lr", "CIDEr by beta1", "CIDEr by eps"]


def test_hundreds_of_runs(tmp_path):
    for index in range(300):
        lr = 10 ** (-5 + index / 100)
        make(tmp_path / f"{index:03}", config={"optim": {"lr": lr}}, results=cider(math.sin(index)), log=[])
    printed, page, data = written(tmp_path)
    assert len(data["runs"]) == 300 and "260 more runs" in printed and page.count("<tr>") > 300


def test_text_of_runs_cannot_break_the_page(tmp_path):
    make(tmp_path / "a", config={"x": "<script>"}, results=cider(1), state="failed", error="<b>[red]")
    make(tmp_path / "b", config={"x": "y" * 200}, results=cider(2))
    printed, page, _ = written(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>[red]" in printed and "y" * 41 + "<" not in page


def test_long_values_keep_both_ends():
    assert shortened("/a/" + "b" * 60 + "/end", 20).endswith("bb/end") and len(shortened("x" * 99, 20)) == 20


def test_no_paddle_is_imported():
    code = "import sys, blip2x.engine.compare; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_real_browser_shows_it_on_a_phone(tmp_path, browser):
    written(sweep(tmp_path))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "comparison.html").as_uri())
    assert page.title() == "4 runs compared \u00b7 blip2x"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # tables scroll in their boxes
    assert page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('#runs .scroll'))")
    assert int(page.evaluate("getComputedStyle(document.querySelector('#runs td b')).fontWeight")) >= 700
    assert page.inner_text("#runs td b") == "1.50" and said == []
