"""`runners/run.py` as two processes: the real stage 1, captions and answers, and a bad image on one of the two."""

import json
from pathlib import Path

import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.engine.run_files import TIMES
from blip2x.errors import Interrupted
from blip2x.tasks.common.launch import launch

RUNNER = Path(__file__).with_name("runner.py")
CONTRAST, STEPS, BATCH = 3, 6, 8
# A pair scores by its best query, and fresh queries are nearly alike: where rounding prefers another one, gradients jump by
# some percent. With this seed no two come that close in the first steps.
SEED = 3

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(run):
    return [row for row in rows(run / "metrics.jsonl") if "loss" in row]


def words(demo, ranks, parallelism, *stages, micro_batches=1):
    """The program's words: stage 1 from the demo's image encoder, and what else there is from its stage 2.

    With tensor parallelism there is no stage 1, where ranks share nothing.
    """
    steps = [f"batch_size={BATCH // ranks // micro_batches}", f"accumulate={micro_batches}", f"max_steps={STEPS}"]
    steps += ["max_epochs=null", "log_every=1", "eval_batch_size=5", f"cached_contrast={str(micro_batches > 1).lower()}"]
    stage1 = ",".join(f"'task.{step}'" for step in [*steps, f"contrast_steps={CONTRAST}"])
    later = f"'model.weights={demo.checkpoint('pretrain_stage2')}','task.eval_batch_size=5'"
    listed = [f"{{task: {stage}, overrides: [{later}]}}" for stage in stages]
    if parallelism != "tp2":
        listed.insert(0, f"{{task: pretrain_stage1, overrides: [{stage1}]}}")
    vision = f"model.vision.weights={demo.checkpoint('pretrain_vision')}"
    few = ["dataset.train_scenes=64", "dataset.test_scenes=12", "optim.warmup_steps=0"]
    return [f"parallelism={parallelism}", "run_name=r", f"seed={SEED}", *few, vision, f"task.stages=[{','.join(listed)}]"]


def program(start, folder, words, *, trainings=1):
    """The run folder of two processes that ended well and with equal weights."""
    first, second = start(RUNNER, folder, *words, f"paths.outputs={folder}", processes=2)
    assert first["code"] == second["code"] == 0
    assert first["weights"] == second["weights"] and len(first["weights"]) == trainings
    return folder / "r"


@pytest.fixture(scope="module")
def runs(start, demo, tmp_path_factory):
    """By number of processes, the run folder."""
    folder, finished = tmp_path_factory.mktemp("program"), demo("model=tiny_opt")
    later = ("caption", "vqa_zeroshot")
    launch(compose_config([*words(finished, 1, "single", *later), f"paths.outputs={folder}"]), ["x"])
    return {1: folder / "r", 2: program(start, folder / "2", words(finished, 2, "dp", *later))}


def test_two_ranks_train_stage_1_to_the_same_weights(runs):
    """Matching and captioning join in on the way; parameters that had no gradient before then get one."""
    found = [row.keys() & {"itc", "itm", "lm"} for row in losses(runs[2])]
    assert found == [{"itc"}] * CONTRAST + [{"itc", "itm", "lm"}] * (STEPS - CONTRAST)


def same_contrast(one, two):
    """Whether two ranks see the pairs of one process's batch; matching draws its negatives by each rank's own lot."""
    for row, other in zip(one[: CONTRAST + 1], two[: CONTRAST + 1], strict=True):
        assert other["itc"] == pytest.approx(row["itc"], abs=1e-4)
        assert other["temperature"] == pytest.approx(row["temperature"], abs=1e-6)
    for row, other in zip(one[:CONTRAST], two[:CONTRAST], strict=True):
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    # a mean per token of all ranks, though the captions of one are longer
    assert two[CONTRAST]["lm"] == pytest.approx(one[CONTRAST]["lm"], rel=1e-4)


def test_contrast_is_over_the_pairs_of_all_ranks(runs):
    """4 pairs on each."""
    same_contrast(losses(runs[1]), losses(runs[2]))


@pytest.mark.slow
def test_cached_contrast_is_over_the_pairs_of_all_ranks_and_micro_batches(runs, start, demo, tmp_path):
    """2 pairs on each rank, twice before the step."""
    run = program(start, tmp_path, words(demo("model=tiny_opt"), 2, "dp", micro_batches=2))
    same_contrast(losses(runs[1]), losses(run))


@pytest.mark.slow
def test_sharded_optimizers_train_as_dp_does(runs, start, demo, tmp_path):
    """Also the weights that no loss reaches at first: they neither move nor decay."""
    run = program(start, tmp_path, words(demo("model=tiny_opt"), 2, "sharding1"))
    for row, other in zip(losses(runs[2]), losses(run), strict=True):
        for name in row.keys() & {"loss", "itc", "itm", "lm"}:
            assert other[name] == pytest.approx(row[name], abs=1e-3), (row["step"], name)


@pytest.mark.slow
def test_one_rank_is_asked_to_stop_and_the_run_goes_on_later(runs, start, demo, tmp_path, monkeypatch):
    """Both save and end with the code for "again", and the second command ends as if there had been one."""
    later = ("caption", "vqa_zeroshot")
    again = [*words(demo("model=tiny_opt"), 2, "dp", *later), f"paths.outputs={tmp_path}", "resume=auto"]
    with monkeypatch.context() as stopping:
        stopping.setenv("STOP_RANK", "1")
        stopping.setenv("STOP_STEP", "4")
        try:
            ranks = start(RUNNER, tmp_path, *again, processes=2)
        except AssertionError:  # the launcher ended one before it had written its file
            ranks = []
    assert all(rank["code"] == Interrupted.EXIT_CODE for rank in ranks)
    assert [path.name for path in (tmp_path / "r/pretrain_stage1/checkpoints").glob("step-*")] == ["step-00000004"]
    ranks = start(RUNNER, tmp_path / "again", *again, processes=2)
    assert [rank["code"] for rank in ranks] == [0, 0]
    found, wanted = (
        [{name: value for name, value in row.items() if name not in TIMES} for row in rows(run / "metrics.jsonl")]
        for run in (tmp_path / "r", runs[2])
    )
    assert found == wanted
    for stage in later:
        assert rows(tmp_path / f"r/{stage}/predictions.jsonl") == rows(runs[2] / stage / "predictions.jsonl")


def assert_same_texts(found, wanted):
    one, two = (json.loads((run / "results.json").read_text()) for run in (wanted, found))
    for stage in ("caption", "vqa_zeroshot"):
        assert one[stage].keys() == two[stage].keys()
        assert two[stage] == pytest.approx(one[stage])
        alone, shared = (rows(run / stage / "predictions.jsonl") for run in (wanted, found))
        assert len(alone) >= 12
        for row, other in zip(alone, shared, strict=True):
            assert other.pop("score") == pytest.approx(row.pop("score"), abs=1e-4)  # other batches, other rounding
            assert other == row


def test_two_ranks_evaluate_each_sample_once(runs):
    assert_same_texts(runs[2], runs[1])
    one, two = (json.loads((runs[ranks] / "results.json").read_text())["pretrain_stage1"] for ranks in (1, 2))
    assert one.keys() == two.keys()
    assert one["chance"] == two["chance"] == pytest.approx(1 / 12)


@pytest.mark.slow
def test_ranks_that_share_a_language_model_write_the_same_texts(runs, start, demo, tmp_path):
    split = words(demo("model=tiny_opt"), 2, "tp2", "caption", "vqa_zeroshot")
    assert_same_texts(program(start, tmp_path, split, trainings=0), runs[1])


def test_what_one_process_does_is_done_once(start, tmp_path):
    """Though several were started, for whose memory is asked."""
    words = ["task=doctor", "task.of=pretrain_vision", "task.steps=false", "dataset.train_scenes=512"]
    words += ["run_name=r", "parallelism=dp", f"paths.outputs={tmp_path}"]
    assert [rank["code"] for rank in start(RUNNER, tmp_path, *words, processes=2)] == [0, 0]
    assert "2 ranks (dp 2, sharding 1, tp 1)" in (tmp_path / "r/memory.md").read_text()


def test_a_bad_image_on_one_rank_stops_both(start, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.effect_noise((48, 48), 90).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/2.png").write_bytes(b"this is no picture")
    captions = [{"image": f"{number}.png", "caption": "noise"} for number in range(4)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    data = [f"dataset.{split}_captions={tmp_path}/captions.json" for split in ("train", "eval")]
    steps = ["task.batch_size=1", "task.max_steps=9", "task.max_epochs=null", "model.vision.frozen=false"]
    words = ["task=pretrain_stage1", "dataset=custom", f"dataset.images={tmp_path}/images", *data, "dataset.num_workers=0"]
    try:
        more = ["parallelism=dp", "run_name=r", f"paths.outputs={tmp_path}"]
        ranks = start(RUNNER, tmp_path / "out", *words, *steps, *more, processes=2)
    except AssertionError:  # the launcher ended the other rank before that one noticed
        ranks = []
    assert not any(rank["code"] == 0 for rank in ranks)
    logs = "".join(path.read_text(errors="replace") for path in (tmp_path / "out/log").glob("workerlog.*"))
    assert f"error: {tmp_path}/images/2.png is not an image that Pillow can read" in logs
