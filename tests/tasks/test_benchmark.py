"""All kinds of work run, what is written about them is right, and nothing begins that cannot be measured. No times."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import paddle
import pytest
from rich.console import Console

from blip2x.config.check_task import BENCHMARKS, check_task
from blip2x.config.compose import compose_config
from blip2x.config.dataset import Cache
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine import memory
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.flops import Work, generation_flops, retrieval_flops, training_flops
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.parallel.context import Context
from blip2x.tasks import benchmark
from blip2x.tasks.benchmark import Benchmark
from blip2x.tasks.benchmarking import checks
from blip2x.tasks.benchmarking.curves import Curve
from blip2x.tasks.benchmarking.growth import GROWTHS
from blip2x.tasks.benchmarking.jobs import job_of
from blip2x.tasks.benchmarking.models import build
from blip2x.tasks.benchmarking.work import Training
from blip2x.tasks.common.launch import launch

QUICK = [
    *("task.batch_size=2", "task.repeats=1", "task.warmup=0", "task.text_length=8", "task.questions=3"),
    *("task.new_tokens=3", "task.num_beams=2", "task.matmul_sizes=[32]"),
    *("dataset.train_scenes=16", "dataset.test_scenes=8"),
]
WORDS = ["model.qformer.vocab_size=50", "model.language.vocab_size=60"]
PARTS = {
    "pretrain_stage1": {"vision", *(f"qformer_{name}" for name in ("image", "text", "pair", "caption")), "losses"},
    "pretrain_stage2": {"vision", "qformer_image", "language", "losses"},
    "caption": {"vision", "qformer_image", "prefill", "decode", "reorder"},
    "vqa_zeroshot": {"vision", "qformer_image", "prefill", "decode", "reorder"},
    "retrieval": {"vision", "qformer_image", "qformer_text", "qformer_pair"},
}


@pytest.fixture(scope="module")
def measure(tmp_path_factory, small):
    """`measure(*overrides)`: results.json and benchmark.json of a tiny run, and its folder."""

    def run(*overrides):
        words = ["task=benchmark", *small, *QUICK, *overrides, f"paths.outputs={tmp_path_factory.mktemp('benchmark')}"]
        memory._jobs = 0  # as in a process of its own
        cfg = compose_config([*words, "run_name=run"])
        results = launch(cfg, ["runners/run.py", *words])
        folder = tmp_path_factory.getbasetemp().joinpath(cfg.paths.outputs, "run")
        return results, json.loads((folder / "benchmark.json").read_text()), folder

    return run


@pytest.fixture(scope="module")
def all_kinds(measure):
    """Every kind of work on made-up pictures and texts."""
    return measure(*WORDS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_kind_of_work_is_measured(all_kinds, name):
    results, record, _ = all_kinds
    found, own = results[name], record["tasks"][name]
    assert found["images_per_second"] == 2 / found["step_seconds"]
    expected = PARTS[name] | {"data", "rest"} | ({"backward", "optimizer"} if name.startswith("pretrain") else set())
    assert set(own["parts"]) == expected
    assert {key for key in found if "/" in key} == {f"step_seconds/part/{part}" for part in expected}
    (whole,) = own["step_with_timers"]["seconds"]
    assert sum(part["seconds"][0] for part in own["parts"].values()) == pytest.approx(whole, rel=0.01, abs=1e-3)
    assert len(own["step"]["seconds"]) == 1
    assert found["memory_gb"] is not None and found["utilisation"] > 0


def test_operations_are_those_of_the_model(all_kinds, small):
    _, record, _ = all_kinds
    model = compose_config(["task=caption", *small, *WORDS]).model
    found = {name: own["flops"] for name, own in record["tasks"].items()}
    pairs = Work(images=2, texts=2, text_tokens=8)
    assert found["pretrain_stage1"] == training_flops(model, "pretrain_stage1", pairs)
    assert found["pretrain_stage2"] == training_flops(model, "pretrain_stage2", pairs)
    assert found["caption"] == generation_flops(model, replace(pairs, new_tokens=3, beams=2))
    assert found["vqa_zeroshot"] == generation_flops(model, replace(pairs, texts=6, new_tokens=3, beams=2))
    assert found["retrieval"] == retrieval_flops(model, pairs, pairs=4)


def test_a_search_counts_each_pair_and_each_image_once(small):
    model = compose_config(["task=retrieval", *small, *WORDS]).model
    qformer, width, queries, length = model.qformer, model.qformer.width, model.qformer.num_queries, 8
    both, patches = queries + length, 1 + (model.vision.image_size // model.vision.patch_size) ** 2
    # its only layer, which looks: all positions answer, and the queries alone go on
    layer = 4 * both * width**2 + 2 * queries * width * (2 * width + 2 * qformer.mlp_width) + 4 * queries * both * width
    look = 4 * queries * width**2 + 4 * queries * patches * width
    more, fewer = (retrieval_flops(model, Work(images=3, texts=5, text_tokens=length), pairs=pairs) for pairs in (7, 6))
    assert more["qformer"] - fewer["qformer"] == layer + look + 4 * queries * width
    assert more["vision"] == fewer["vision"] == 3 * retrieval_flops(model, Work(1, 5, length), pairs=7)["vision"]


def test_tokens_are_those_that_are_predicted_or_written(all_kinds):
    _, record, _ = all_kinds
    tokens = {name: own["tokens"] for name, own in record["tasks"].items()}
    # stage 1 predicts all but the first token; stage 2 all but bos
    written = {"pretrain_stage1": 2 * 7, "pretrain_stage2": 2 * 7, "caption": 2 * 3, "vqa_zeroshot": 2 * 3 * 3, "retrieval": 0}
    assert tokens == written


def test_the_record_says_on_what_it_was_measured(all_kinds):
    _, record, folder = all_kinds
    assert record["hardware"]["cpu"] and record["versions"]["paddlepaddle"] and "git_commit" in record["versions"]
    assert record["command"].startswith("runners/run.py task=benchmark")
    assert record["tasks"]["caption"]["model"]["vision"]["depth"] == 1
    assert record["matrix_peak"] > 0 and (record["device"], record["ranks"], record["precision"]) == ("cpu", 1, "fp32")
    assert not (folder / "scratch").exists()
    page = (folder / "benchmark.md").read_text()
    assert record["command"] in page and record["hardware"]["cpu"] in page and "Ranks: 1; threads" in page
    assert "\n| part | median | min .. max | share |\n| --- | ---: |" in page and "| image encoder |" in page
    assert "\n## Rates\n\n| task | step |" in page and "| retrieval | " in page and "Cost against size" not in page
    assert "Step by part" in (folder / "report.html").read_text() and "part of a step" in (folder / "report.html").read_text()


def test_real_data_and_curves(measure):
    sizes = ["task.sizes.new_tokens=[2,4]", "task.sizes.operations=[10,20]", "task.sizes.batch=[1,2]"]
    words = ["task.of=[pretrain_stage1,caption]", "task.data=true", "task.curves=[batch,new_tokens,operations]", *sizes]
    results, record, folder = measure(*words, "task.overrides=['task.accumulate=2','model.qformer.num_queries=3']")
    stage1, caption = (record["tasks"][name] for name in ("pretrain_stage1", "caption"))
    assert (stage1["images"], stage1["sizes"]["images"], stage1["sizes"]["accumulate"]) == (4, 2, 2)
    assert record["tasks"]["caption"]["model"]["qformer"]["num_queries"] == 3  # of what was measured
    assert (caption["images"], caption["sizes"]["text_tokens"]) == (2, 1)  # bos: the data set's recipe has no prompt
    assert caption["utilisation"] is None and "utilisation" not in results["caption"]  # texts differ in length
    curves = {(curve["size"], curve["of"]): curve for curve in record["curves"]}
    assert {("batch", "pretrain_stage1"), ("batch", "caption"), ("new_tokens", "caption")} < set(curves)
    assert curves["batch", "caption"]["expected"] == pytest.approx(1)
    assert curves["batch", "caption"]["sizes"] == [1, 2] and len(curves["batch", "caption"]["fastest"]) == 2
    assert 0 < curves["new_tokens", "caption"]["expected"] < 1  # the picture and the prompt stay
    assert results["caption"]["new_tokens_exponent"] == curves["new_tokens", "caption"]["exponent"]
    assert {f"{name}_exponent" for name in GROWTHS} <= results["operations"].keys()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "benchmark.md").read_text()
    assert "| new_tokens | caption | 2 | 4 |" in page and page.endswith("![Seconds against size](curves.png)\n")


def test_kept_outputs_of_the_image_encoder_are_there_before_anything_is_measured(measure, tmp_path):
    words = ["task.data=true", "dataset.cache=features", f"paths.cache={tmp_path}", "task.curves=[batch]"]
    _, record, _ = measure("task.of=[pretrain_stage2,vqa_zeroshot,retrieval]", *words, "task.sizes.batch=[1,2]")
    for own in record["tasks"].values():
        assert "vision" not in own["parts"] and own["flops"]["vision"] == 0 < own["flops"]["qformer"]
        assert own["sizes"]["images"] == 2
    assert {curve["of"] for curve in record["curves"]} == {"pretrain_stage2", "vqa_zeroshot"}


@pytest.mark.parametrize("data", [False, True])
def test_only_pictures_of_a_data_set_are_kept(data):
    job = job_of(changed(data=data, words=["dataset.cache=features"]), "caption")
    assert job.cfg.dataset.cache is (Cache.features if data else Cache.none)


def test_what_was_measured_is_written_before_the_next_task_fails(measure, monkeypatch, tmp_path_factory):
    given = benchmark.measure

    def fails_at_the_second(job, *arguments, **named):
        if job.name == "caption":
            raise UserError("no more")
        return given(job, *arguments, **named)

    monkeypatch.setattr(benchmark, "measure", fails_at_the_second)
    with pytest.raises(UserError, match="no more"):
        measure(*WORDS, "task.of=[pretrain_stage2,caption]")
    newest = max(tmp_path_factory.getbasetemp().glob("benchmark*/run/benchmark.json"), key=lambda path: path.stat().st_mtime)
    assert set(json.loads(newest.read_text())["tasks"]) == {"pretrain_stage2"}


def test_a_rank_that_has_curves_alone_writes_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Context, "broadcast_object", lambda *_: pytest.fail("the other ranks are elsewhere"))
    run = Run(tmp_path, tmp_path, "benchmark", Context(), Console(quiet=True), Loggers())
    Benchmark(CONFIG, run)._write("run.py", 1.0, [], [Curve("operations", "merging", [1, 2], [1.0, 2.0], [1.0, 2.0], 1.0)])
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["command"] == "run.py" and record["curves"][0]["exponent"] == pytest.approx(1)


def test_kept_features_are_filled_before_what_is_measured(measure, tmp_path, monkeypatch):
    """Also of the samples that an epoch of this training leaves out: 16 in batches of three."""
    calls, step, forward = [], Training.step, EvaVit.forward
    monkeypatch.setattr(Training, "step", lambda self, clock: (calls.append("step"), step(self, clock)))
    monkeypatch.setattr(
        EvaVit, "forward", lambda self, image_BCHW: (calls.append(len(image_BCHW)), forward(self, image_BCHW))[1]
    )
    words = ["task.data=true", "task.of=[pretrain_stage1]", "task.batch_size=3", "task.repeats=7", f"paths.cache={tmp_path}"]
    _, record, _ = measure(*words, "dataset.cache=features", "dataset.transform.flip=true", "dataset.crops=2")
    first = calls.index("step")
    assert sum(calls[:first]) == 2 * 16 and set(calls[first:]) == {"step"} and calls.count("step") > 2 * 6
    assert record["tasks"]["pretrain_stage1"]["flops"]["vision"] == 0


def test_features_of_made_up_pictures_are_not_kept():
    cfg = compose_config(["task=benchmark", "dataset.cache=features"])
    with pytest.raises(UserError, match=r"keeps what comes of a data set's pictures; set task\.data=true"):
        Benchmark.check(cfg)


def test_random_weights_are_kept_as_a_task_says(small, tmp_path):
    overrides = [*small, *WORDS, "task.weights_dtype=int8", f"paths.outputs={tmp_path}"]
    run = Run(tmp_path, tmp_path, "benchmark", Context(), Console(quiet=True), Loggers())
    model, tokenizer = build(job_of(changed(overrides=overrides), "caption"), run)
    assert str(model.language.opt.decoder.layers[0].linear1.weight.dtype) == "paddle.int8" and tokenizer.vocab_size == 60
    ids = paddle.to_tensor(tokenizer.encode(["one", "two"], max_length=4)[0])
    logits = model.language(model.language.embed(ids), paddle.ones_like(ids))
    assert logits.shape == [2, 4, 60] and bool(paddle.isfinite(logits).all()) and float(logits.std()) > 0


def test_weights_that_are_named_are_read(measure, small, trained):
    _, record, _ = measure(f"model.weights={trained}/pretrain_stage2/checkpoint", "task.of=[caption]")
    words = TextTokenizer.load(trained / "pretrain_stage2" / "checkpoint" / "tokenizers" / "language").vocab_size
    model = compose_config(["task=caption", *small]).model
    counted = generation_flops(model, Work(2, 2, 8, new_tokens=3, beams=2), vocab_sizes={"language": words})
    assert record["tasks"]["caption"]["flops"] == counted


def test_weights_need_no_data_set_where_pictures_are_made_up(small, trained):
    words = [*small, f"model.weights={trained}/pretrain_stage2/checkpoint", "dataset=coco", "paths.data=nowhere"]
    Benchmark.check(compose_config(["task=benchmark", "task.of=[caption]", *words, f"task.words={words}"]))


CONFIG = compose_config(["task=benchmark"])


def changed(**values):
    """The task's config with other values; those of "sizes" are of task.sizes."""
    task = copy.deepcopy(CONFIG.task)
    sizes = replace(task.sizes, **values.pop("sizes", {}))
    return replace(task, **values, sizes=sizes)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"of": ["caption", "paint"]}, "'paint'; known: pretrain_stage1"),
        ({"of": []}, "measures nothing"),
        ({"of": ["caption", "caption"]}, "more than once"),
        ({"curves": ["width"]}, "'width'; known: batch"),
        ({"batch_size": 0}, "task.batch_size must be at least 1"),
        ({"repeats": 0}, "task.repeats must be at least 1"),
        ({"text_length": 2}, "task.text_length must be at least 3"),
        ({"sizes": {"queries": [8, 0]}}, "task.sizes.queries must be sizes of at least 1"),
        ({"matmul_sizes": []}, "task.matmul_sizes must be sizes of at least 1"),
        ({"curves": ["batch"], "sizes": {"batch": [4, 2]}}, "rising"),
        ({"curves": ["batch"], "sizes": {"batch": [4]}}, "at least two sizes"),
        ({"curves": ["image_tokens"], "sizes": {"image_tokens": [16, 20]}}, "20 patches form no square"),
    ],
)
def test_wrong_settings_are_refused(values, named):
    with pytest.raises(UserError, match=named):
        check_task(changed(**values))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"curves": ["new_tokens"], "of": ["retrieval"]}, "none of retrieval has such a size; add one of caption"),
        ({"of": ["caption"], "text_length": 92}, "8 queries, task.text_length=92 and 30 new tokens make more than .*=128"),
        ({"of": ["pretrain_stage1"], "text_length": 600}, "max_txt_len=600 is more than"),
        ({"of": ["pretrain_stage2"], "curves": ["queries"], "sizes": {"queries": [1, 120]}}, "120 queries .*=128"),
        ({"of": ["caption"], "overrides": ["task.beams=2"]}, "beams"),
        ({"of": ["caption"], "overrides": ["model.weights=nowhere"]}, "nowhere"),
        ({"of": ["caption"], "data": True, "images": 500}, "measured on 500 images, and digits has 400 in its split eval"),
        ({"of": ["vqa_zeroshot"], "data": True, "images": 500}, "has 400 in its split eval; lower task.images"),
        ({"of": ["pretrain_stage2"], "data": True, "batch_size": 9000}, "split train; lower task.batch_size"),
        ({"overrides": ["task.batch_size=2"]}, "sets task.batch_size of what it measures, by task.batch_size"),
        ({"overrides": ["task=retrieval"]}, "by task.of"),
        ({"overrides": ["task.lm_weight=0"]}, "by nothing: all losses are measured"),
        ({"overrides": ["precision.name=bf16"]}, "but precision is the same for all that is measured"),
        ({"num_beams": 2, "overrides": ["task.num_beams=3"]}, "sets task.num_beams of what it measures, by task.num_beams"),
        ({"overrides": ["dataset.num_workers=2"]}, "made-up pictures need no loading"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_begins(values, named):
    with pytest.raises(UserError, match=named):
        Benchmark.check(replace(CONFIG, task=changed(**values)))


def test_the_last_token_that_is_written_takes_no_position():
    task = changed(of=["caption"], text_length=128 - CONFIG.model.qformer.num_queries - 30 + 1)
    Benchmark.check(replace(CONFIG, task=task))


@pytest.mark.parametrize("name", ["pretrain_stage2", "caption"])
def test_a_model_that_does_not_fit_is_refused(monkeypatch, name):
    monkeypatch.setattr(checks, "free_memory", lambda device: (2**20, "on this machine"))
    with pytest.raises(UserError, match=f"{name} does not fit into memory: a rank needs .* and 1.0 MiB are free on this"):
        checks.check_job(job_of(CONFIG.task, name))
