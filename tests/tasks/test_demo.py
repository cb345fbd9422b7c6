"""`python runners/run.py` from nothing to its report: what the run folder holds, and that it can be repeated."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from blip2x.models.weights.manifest import frozen_origins, read_manifest
from tests.engine.loggers.wandb_files import read

ROOT = Path(__file__).parents[2]
PROMISED = {
    "pretrain_language": {"perplexity"},
    "pretrain_vision": {"digit_accuracy"},
    "pretrain_stage1": {"i2t_recall@1", "t2i_recall@1", "chance", "eval_itm_accuracy", "majority_eval_itm_accuracy"},
    "pretrain_stage2": {"eval_loss", "blind_eval_loss"},
    "caption": {"CIDEr", "blind_CIDEr", "BLEU-4", "blind_BLEU-4"},
    "vqa_zeroshot": {"accuracy", "blind_accuracy", "majority_accuracy"},
}
WHOLE = ["pretrain_stage1", "pretrain_stage2"]
WITH_LOGGERS = ("model=tiny_opt", "seed=42", "logger=[wandb_offline,tensorboard]")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["tiny_opt", "tiny_t5"])
def run(request, demo):
    return demo(f"model={request.param}")


def test_results_have_each_metric_beside_its_baseline(run):
    results = json.loads((run.folder / "results.json").read_text())
    assert results == run.results
    for stage, names in PROMISED.items():
        assert names <= results[stage].keys(), stage
        assert all(math.isfinite(value) for value in results[stage].values()), stage
    assert list(results) == [*PROMISED, "seconds", "peak_memory_gb"]
    assert results["pretrain_stage1"]["chance"] == pytest.approx(1 / 12)
    for kind in ("seen", "held_out"):  # apart as well
        assert f"{kind}/i2t_recall@1" in results["pretrain_stage1"]
        assert f"{kind}/CIDEr" in results["caption"] and f"{kind}/accuracy" in results["vqa_zeroshot"]


def test_metrics_are_of_every_training(run):
    lines = rows(run.folder / "metrics.jsonl")
    trained = [stage for stage in PROMISED if stage.startswith("pretrain")]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == trained
    for stage in trained:
        assert [line["step"] for line in lines if line["stage"] == stage and "loss" in line] == [2, 4, 6]
    parts = [line.keys() & {"itc", "itm", "lm"} for line in lines if line["stage"] == "pretrain_stage1" and "loss" in line]
    assert parts == [{"itc"}, {"itc", "itm", "lm"}, {"itc", "itm", "lm"}]  # contrast alone for three steps


def test_predictions_are_of_every_image_and_every_question(run):
    captions, answers = (rows(run.folder / stage / "predictions.jsonl") for stage in ("caption", "vqa_zeroshot"))
    assert len({row["image_id"] for row in captions}) == len(captions) == 12
    assert len({row["question_id"] for row in answers}) == len(answers) > 24
    for row in captions:
        assert row["references"] and isinstance(row["caption"], str) and "CIDEr" in row["scores"]
        assert (run.folder / "caption" / row["image"]).is_file()
        assert (run.folder / "caption" / row["attention"]).is_file()
    for row in answers:
        assert row["question"] and row["answers"] and row["correct"] in (0, 1) and isinstance(row["prediction"], str)
    looks = {row["image_id"]: row["attention"] for row in answers if "attention" in row}
    assert len(looks) == 12 and sum("attention" in row for row in answers) == 12  # with the first question about each image
    assert all((run.folder / "vqa_zeroshot" / path).is_file() for path in looks.values())
    right = sum(row["correct"] for row in answers) / len(answers)
    assert run.results["vqa_zeroshot"]["accuracy"] == pytest.approx(100 * right)


def test_checkpoints_are_whole_and_know_where_their_frozen_parts_are(run):
    for stage in ("pretrain_language", "pretrain_vision", *WHOLE):
        manifest = read_manifest(run.checkpoint(stage))
        assert (manifest["kind"], manifest["step"]) == (stage, 6)
    vision, language = (str(run.checkpoint(f"pretrain_{part}")) for part in ("vision", "language"))
    assert frozen_origins(run.checkpoint("pretrain_stage1")) == {"vision": vision}
    assert frozen_origins(run.checkpoint("pretrain_stage2")) == {"vision": vision, "language": language}
    for stage in WHOLE:
        settings = read_manifest(run.checkpoint(stage))["extra"]["settings"]
        assert settings["vision.num_heads"] == settings["qformer.num_heads"] == 4 and settings["ln_vision_eps"] == 1e-5
        assert ("language.num_heads" in settings) == (stage == "pretrain_stage2")
        assert not any(name.startswith(("vision.", "language.")) for name in read_manifest(run.checkpoint(stage))["tensors"])


def test_the_report_stands_alone(run):
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "i2t_recall@1" in page.replace("\n", "")
    assert "<link" not in page and 'src="http' not in page


def test_the_same_seed_gives_the_same_numbers_and_texts(demo):
    def measured(run):
        texts = [rows(run.folder / stage / "predictions.jsonl") for stage in ("caption", "vqa_zeroshot")]
        losses = [(line["stage"], line["step"], line.get("loss")) for line in rows(run.folder / "metrics.jsonl")]
        return {stage: run.results[stage] for stage in PROMISED}, texts, losses

    assert measured(demo("model=tiny_opt")) == measured(demo(*WITH_LOGGERS))


def test_loggers_have_all_stages_of_a_pipeline_in_one_run(demo):
    run = demo(*WITH_LOGGERS)
    (path,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    logged, lines = read(path), rows(run.folder / "metrics.jsonl")
    drawn = [line for line in logged.history if not any("/predictions/" in key or "/examples/" in key for key in line)]
    assert drawn == [{f"{line['stage']}/{key}": line[key] for key in line if key != "stage"} for line in lines]
    tables = [key.removesuffix("/ncols") for line in logged.history for key in line if key.endswith("/ncols")]
    validated = [f"{stage}/examples" for stage in WHOLE]
    assert list(dict.fromkeys(tables)) == [*validated, "caption/predictions", "vqa_zeroshot/predictions"]
    assert logged.summary["results/caption/CIDEr"] == run.results["caption"]["CIDEr"]
    assert logged.metrics["pretrain_stage2/CIDEr"].summary.max and logged.exit_code == 0
    stages = {path.parent.name for path in run.folder.glob("tensorboard/*/events.*")}
    assert stages == {line["stage"] for line in lines} | {"caption", "vqa_zeroshot"}


@pytest.mark.parametrize("task", ["pretrain_vision", "pretrain_stage1"])
def test_another_seed_gives_other_numbers(run_task, task):
    losses = []
    for seed in (42, 1):
        _, folder = run_task(task, "model.vision.frozen=false", f"seed={seed}")
        losses.append([line["loss"] for line in rows(folder / "metrics.jsonl") if "loss" in line])
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_reaches_its_goals(tmp_path):
    command = [sys.executable, "runners/run.py", f"paths.outputs={tmp_path}", "run_name=demo"]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    stage1, caption, vqa = (results[stage] for stage in ("pretrain_stage1", "caption", "vqa_zeroshot"))
    assert min(stage1["i2t_recall@1"], stage1["t2i_recall@1"]) >= 10 * stage1["chance"]
    assert caption["CIDEr"] >= 3 * caption["blind_CIDEr"]
    assert vqa["accuracy"] >= vqa["blind_accuracy"] + 25
    assert (tmp_path / "demo/report.html").is_file()
