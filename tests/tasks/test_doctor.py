"""What is looked at, what is said about it, and that nothing is needed or made for it."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import paddle
import pytest

from blip2x.config.check_task import check_task
from blip2x.config.compose import compose_config
from blip2x.engine import memory, memory_table
from blip2x.engine.memory_table import amount
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout, Part, Prediction
from blip2x.tasks import doctor
from blip2x.tasks.checkup import memory as checkup_memory
from blip2x.tasks.checkup.examined import Examined, Wanted
from blip2x.tasks.checkup.findings import Findings
from blip2x.tasks.checkup.memory import Texts, model_of, needed, texts_of, verdict
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.launch import launch

FEW = ["dataset.train_scenes=16", "dataset.test_scenes=12"]
ENOUGH = ["dataset.train_scenes=64", "dataset.test_scenes=12"]  # for a batch


@functools.cache
def composed(*words):
    """Composing takes longer than most of what is tested."""
    return compose_config(list(words))


def looked_at(*words):
    """Name -> config."""
    found = doctor.looked_at(compose_config(["task=doctor", *words]).task)
    return {name: wanted.cfg for name, wanted in found.items()}


def test_the_commands_words_go_to_the_task_that_is_looked_at():
    (cfg,) = looked_at("task.of=pretrain_stage1", "optim.lr=1e-3", "run_name=r", "model=tiny_t5").values()
    assert (cfg.task.kind, cfg.optim.lr, cfg.run_name, cfg.model.name) == ("pretrain_stage1", 1e-3, None, "tiny_t5")
    assert cfg.task.batch_size == 64 and cfg.task.max_txt_len == 18  # of conf/recipe/digits/pretrain_stage1.yaml


def test_overrides_are_the_tasks_own():
    words = "task.overrides=['task.batch_size=3','precision=bf16','parallelism=sharding2']"
    (cfg,) = looked_at("task.of=pretrain_stage1", words, "task.world_size=4").values()
    assert (cfg.task.batch_size, cfg.precision.name.value, cfg.parallelism.sharding_stage) == (3, "bf16", 2)


def test_an_experiment_brings_its_task():
    (name,) = looked_at("task.of=null", "task.overrides=['experiment=caption_coco_ft_opt2.7b']")
    assert name == "caption"


def test_each_stage_of_a_pipeline_is_looked_at_without_what_earlier_ones_make():
    found = doctor.looked_at(compose_config(["task=doctor", "task.of=pipeline", "seed=7"]).task)
    assert list(found)[:4] == ["pretrain_language", "pretrain_vision", "pretrain_stage1", "pretrain_stage2"]
    assert list(found)[4:] == ["caption", "vqa_zeroshot"]
    stage2 = found["pretrain_stage2"]
    assert stage2.promised == {"model.vision.weights", "model.qformer.weights", "model.language.weights", "model.weights"}
    assert found["pretrain_language"].promised == set() and stage2.cfg.seed == 7
    given = [stage2.words[place] for place in stage2.givers]
    assert given == ["task=pretrain_stage2"] and set(stage2.givers.values()) == {"the pipeline's stage"}


def test_questions_count_as_long_as_they_are_or_else_as_they_may_be():
    cfg = composed("task=vqa_finetune", *FEW)
    texts, questions = texts_of(cfg), [sample.question for sample in build_source(cfg).questions("train")]
    longest = max(len(question.replace("?", " ?").split()) for question in questions)
    assert (texts.question_length, texts.output_length) == (longest + 2, 0) and longest + 2 < cfg.task.max_txt_len
    assert texts.length > texts.question_length  # the prompt and the answer
    cfg = composed("task=vqa_finetune", "model=flant5xl", "dataset=coco")
    assert texts_of(cfg) == Texts(64, 64, {"qformer": 30523, "language": 32128}, 64)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["task.overrides=['task.batch_size=0']"], "task.batch_size must be at least 1"),
        (["task.overrides=['task.batchsize=1']"], "batchsize"),
    ],
)
def test_mistakes_are_named(words, named):
    with pytest.raises(UserError, match=named):
        looked_at(*words)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("of", "doctor", "task.of=doctor would look at itself"),
        ("of", "stage1", "unknown task 'stage1'"),
        ("steps", "maybe", "task.steps must be true, false or auto, got maybe"),
        ("steps", 1, "task.steps must be true, false or auto, got 1"),
        ("world_size", 0, "task.world_size must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(key, value, named):
    with pytest.raises(UserError, match=named):
        check_task(replace(composed("task=doctor").task, **{key: value}))


def test_degrees_have_to_make_the_ranks():
    cfg = composed("task=pretrain_stage2", "parallelism=tp2")
    with pytest.raises(UserError, match=r"= 1 \* 1 \* 2 = 2, but 3 process"):
        Layout.of(cfg, 3)
    assert Layout.of(cfg, 4).degrees.dp == 2
    cfg = composed("task=pretrain_stage2", "parallelism=sharding3")
    with pytest.raises(UserError, match=r"sharding_stage=3 with parallelism\.sharding=1"):
        Layout.of(cfg, 1)
    assert Layout.of(cfg, 4).sharding_stage == 3


def check_up(folder, *words):
    """(Results, what doctor.json has) of a check-up."""
    command = ["task=doctor", *words, f"paths.outputs={folder}", "run_name=r"]
    results = launch(compose_config(command), command)
    return results, json.loads((folder / "r/doctor.json").read_text())


def verdicts(found, where):
    return {line["check"]: line["verdict"] for line in found["lines"] if line["where"] == where}


@pytest.fixture(autouse=True)
def much_memory(monkeypatch):
    """What fits does not depend on the machine that tests run on."""
    monkeypatch.setattr(checkup_memory, "free_memory", lambda device: (2**40, "on this machine"))


def test_it_needs_no_weights_and_leaves_a_page(tmp_path):
    results, found = check_up(tmp_path, "task.of=pretrain_stage1", "model=opt2.7b", "dataset=coco")
    record = json.loads((tmp_path / "r/memory.json").read_text())["pretrain_stage1"]
    assert results["pretrain_stage1"]["predicted_gib"] == pytest.approx(record["peak"] / 2**30, abs=1e-3)
    assert [part["name"] for part in record["parts"]] == ["vision", "ln_vision", "qformer", "heads"]
    page = (tmp_path / "r/memory.md").read_text()
    assert "| vision | 985,894,528 | 0 | float32 | 3.67 GiB |" in page and "GiB free on this machine" in page
    assert "100 samples per rank, texts of 32 tokens, 224 pixels, fp32, 1 rank" in page
    said = verdicts(found, "pretrain_stage1")
    assert said["published counts"] == "fine" and said["start"] == said["trial"] == "look"
    assert results["pretrain_stage1"]["broken"] == results["machine"]["broken"] == 0


def test_a_training_step_and_captions_by_a_real_one(tmp_path):
    """Both towers are trained, from random numbers, so that nothing is needed."""
    free = ["model.vision.frozen=false", "task.overrides=['task.batch_size=8','task.save_every=1','task.keep_best=1',"]
    free[1] += "'task.best_metric=CIDEr','task.validation.captions=true']"
    _, found = check_up(tmp_path, "task.of=pretrain_stage1", *ENOUGH, *free)
    said, record = verdicts(found, "pretrain_stage1"), found["found"]["pretrain_stage1"]
    assert {"one step": "fine", "gradients": "fine", "trial": "fine"}.items() <= said.items()
    step = next(line["found"] for line in found["lines"] if line["check"] == "one step")
    assert all(f"{name} " in step for name in ("loss", "itc", "itm", "lm"))  # at once, whatever task.contrast_steps says
    assert len(record["texts"]) == 2 and record["texts"][0].startswith("digits/")
    kept = [path.name for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert not [name for name in kept if name.endswith((".safetensors", ".pdparams", ".npz"))] and "done.json" not in kept
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("task", ["caption", "vqa_zeroshot"])
def test_two_samples_by_the_weights_that_are_there(trained, small, tmp_path, task):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    words = [*small, f"model.weights={trained}/pretrain_stage2/checkpoint", *FEW]
    results, found = check_up(tmp_path, f"task.of={task}", *words)
    assert found["found"][task]["texts"] and verdicts(found, task)["trial"] == "fine"
    rows = (tmp_path / "r" / task / "trial/predictions.jsonl").read_text().splitlines()
    images = {json.loads(row)["image_id"] for row in rows}
    assert len(images) == 2 and len(rows) == len(found["found"][task]["texts"])
    assert "steps" not in verdicts(found, task) and "predicted_gib" not in results[task]
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_what_is_broken_stops_no_other_check_and_is_said_at_the_end(tmp_path, monkeypatch):
    def fail(examined):
        raise ZeroDivisionError("no way")

    def refuse(examined):
        raise UserError("task.prompt=x is wrong")

    monkeypatch.setattr(doctor, "check_data", fail)
    monkeypatch.setattr(doctor, "check_prompts", refuse)
    written = []  # before a trial
    monkeypatch.setattr(
        doctor,
        "check_trial",
        lambda *_: written.append((tmp_path / "r/doctor.json").read_text()) or Findings("pretrain_vision"),
    )
    with pytest.raises(
        UserError, match=r"2 of \d+ lines of the check-up are broken, first pretrain_vision, data: ZeroDivision"
    ):
        check_up(tmp_path, "task.of=pretrain_vision", *ENOUGH)
    found = json.loads((tmp_path / "r/doctor.json").read_text())
    said = verdicts(found, "pretrain_vision")
    assert (said["data"], said["prompts"], said["memory"]) == ("broken", "broken", "fine")
    assert verdicts(json.loads(written[0]), "pretrain_vision") == said
    assert verdicts(found, "machine")["versions"] == "fine"
    traces = (tmp_path / "r/traces.txt").read_text()
    assert "ZeroDivisionError: no way" in traces and "task.prompt" not in traces


def test_traces_are_of_this_check_up(run, monkeypatch):
    run.path("traces.txt").write_text("of one before")
    monkeypatch.setattr(doctor, "examined_of", lambda *_: [])
    for name in ("check_versions", "check_devices", "check_disk"):
        monkeypatch.setattr(doctor, name, lambda *_: Findings("machine"))
    doctor.Doctor(SimpleNamespace(task=None), run).run()
    assert not run.path("traces.txt").exists() and run.path("doctor.json").exists()


def test_the_longest_texts_are_the_data_sets_where_its_words_are_the_vocabulary():
    stage1, *stage2 = (
        texts_of(composed(*FEW, *words))
        for words in (
            ["task=pretrain_stage1"],
            ["task=pretrain_stage2"],
            ["task=pretrain_stage2", "model=tiny_t5"],
            ["task=pretrain_stage2", "model=tiny_t5", "task.prefix_split=true", "task.prompt=a photo"],
        )
    )
    assert stage1.length == 18 and stage1.vocab_sizes["qformer"] > 20  # every text is filled up
    opt, t5, split = stage2
    assert 5 < opt.length < 20 and opt.output_length == 0  # bos, a caption, its end
    assert (t5.length, t5.output_length) == (1, opt.length - 1)  # the end alone, a caption and its end
    assert split.length == min(20, 1 + 2 + opt.length - 3)


def test_without_a_data_set_texts_are_as_long_as_allowed():
    for model, split, expected in (("opt2.7b", False, (32, 0)), ("flant5xl", False, (7, 32)), ("flant5xl", True, (32, 32))):
        cfg = composed("task=pretrain_stage2", f"model={model}", "dataset=coco")
        texts = texts_of(replace(cfg, task=replace(cfg.task, prompt="a photo of", prefix_split=split)))
        assert (texts.length, texts.output_length) == expected


def test_a_trained_part_cannot_be_split():
    cfg = copy.deepcopy(composed("task=pretrain_stage2", "parallelism=tp2"))
    cfg.model.language.frozen = False
    with pytest.raises(UserError, match=r"model\.language\.frozen=false trains this one"):
        model_of(cfg, Layout.of(cfg, 2), {"qformer": 9, "language": 9}, {})


MIB = 2**20
PART = Part("qformer", 5, 5, ("float32",), 4 * MIB, 2 * MIB, 3 * MIB, 90 * MIB)
FOUND = Prediction((PART,), MIB, "qformer, forward", checkpoint=12, saving=8, saves_in_background=False)


def test_the_verdict_has_both_numbers():
    need, whose = needed(FOUND, "gpu:0", 4)
    assert verdict(need, whose, 2**30, "on gpu:0") == "It fits: 100.0 MiB needed by a rank, 1.00 GiB free on gpu:0."
    said = verdict(*needed(FOUND, "cpu", 1), 101 * MIB, "on this machine")
    assert said.startswith(f"It does not fit: {amount(FOUND.resident)} needed by a rank, 101.0 MiB free on this machine; lower")


def test_ranks_on_one_cpu_share_its_memory_and_the_first_saves():
    saving = replace(FOUND, saving=200 * MIB)
    need, whose = needed(saving, "cpu", 3)
    assert need == saving.resident + 2 * FOUND.resident == 3 * FOUND.resident + (200 - 91) * MIB
    assert whose == "3 ranks, all on this machine"


def test_ranks_of_this_machine_are_those_that_were_started_here():
    started = {"PADDLE_TRAINER_ENDPOINTS": "one:1,one:2,two:1,two:2", "PADDLE_CURRENT_ENDPOINT": "two:2"}
    assert checkup_memory.ranks_here(4, started) == 2
    assert (
        checkup_memory.ranks_here(4, {}) == checkup_memory.ranks_here(4, started | {"PADDLE_TRAINER_ENDPOINTS": "one:1"}) == 4
    )


@pytest.mark.parametrize(
    ("words", "ranks", "reason"),
    [
        ([], 1, None),
        (["parallelism=dp"], 4, None),
        (["precision=bf16"], 1, "precision=bf16"),
        (["parallelism=sharding3"], 2, "the layout of 2 ranks (dp 1, sharding 2, stage 3, tp 1)"),
    ],
)
def test_what_a_cpu_cannot_do_is_not_compared_with_its_memory(words, ranks, reason):
    cfg = composed("task=pretrain_stage2", *words)
    assert checkup_memory.gpu_reason(cfg, Layout.of(cfg, ranks)) == reason
    if reason:
        said = f"No verdict, for {reason} needs GPUs and there is none here: each rank's has to have 100.0 MiB free."
        assert checkup_memory.no_verdict(FOUND, reason) == said


def test_without_a_verdict_the_results_have_no_free_memory(run):
    cfg = composed("task=pretrain_stage2", "precision=bf16", *FEW)
    examined = Examined("pretrain_stage2", Wanted(cfg, []), run, Layout.of(cfg, 1))
    check_up = doctor.Doctor(SimpleNamespace(task=None), run)
    check_up.found = [checkup_memory.check_memory(examined)]
    found = check_up._result().stages["pretrain_stage2"]
    assert "predicted_gib" in found and "free_gib" not in found
    assert json.loads(run.path("memory.json").read_text())["pretrain_stage2"]["free"] is None
    assert "No verdict, for precision=bf16 needs GPUs" in run.path("memory.md").read_text()


def test_a_wide_terminal_gets_a_table_and_a_narrow_one_lines():
    wide, narrow = memory_table.lines(FOUND), memory_table.lines(FOUND, 80)
    assert memory_table.lines(FOUND, 150) == wide and wide[0].split()[-4:] == ["optimizer", "activations", "in", "all"]
    assert len({len(row) for row in wide}) == 1 and wide[1].split()[:2] == ["qformer", "5"]
    line = "qformer: parameters 5, trained 5, stored as float32, weights 4.0 MiB, gradients 2.0 MiB, optimizer 3.0 MiB"
    assert narrow[0] == f"{line}, activations 90.0 MiB, in all 99.0 MiB"


def test_free_memory_is_what_the_machine_has():
    free, where = memory.free_memory("cpu")
    assert 2**20 < free < 2**50 and where in ("on this machine", "within this container's limit")


def test_free_memory_of_a_gpu_is_the_drivers(monkeypatch):
    monkeypatch.setattr(paddle.cuda, "mem_get_info", lambda index: (index * MIB, 80 * MIB))
    assert memory.free_memory("gpu:3") == (3 * MIB, "on gpu:3")


def test_a_containers_limit_is_smaller_than_the_machine(monkeypatch):
    for limit, expected in ((5 * MIB, (5 * MIB, "within this container's limit")), (2**60, None), (None, None)):
        monkeypatch.setattr(memory, "free_of_limits", lambda root, limit=limit: limit)
        found = memory.free_memory("cpu")
        assert found == expected if expected else found[1] == "on this machine"


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "groups", "names", "expected"),
    [
        ("0::/", {"": (500, 200, 50)}, VERSION_2, 350),  # seen from inside a container
        ("0::/slice/job", {"slice": (300, 100, 0), "slice/job": ("max", 50, 0)}, VERSION_2, 200),
        ("0::/slice/job", {"slice": (300, 100, 0), "slice/job": (100, 50, 0)}, VERSION_2, 50),
        ("0::/", {"": ("max", 50, 0)}, VERSION_2, None),
        ("4:cpu,memory:/docker/a", {"memory": (500, 200, 50)}, VERSION_1, 350),
        ("4:memory:/job", {"memory/job": (500, 200, 0)}, VERSION_1, 300),
        ("4:cpu:/job", {"memory/job": (500, 200, 0)}, VERSION_1, None),
    ],
)
def test_limits_of_control_groups(tmp_path, line, groups, names, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:pids:/\n{line}\n")
    for group, (limit, used, idle) in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {idle}\n")
    assert memory.free_of_limits(tmp_path) == expected
    assert memory.free_of_limits(tmp_path / "not_linux") is None


def test_texts_say_what_they_are():
    cfg = composed("task=pretrain_stage1", *FEW)
    said = checkup_memory.sentences(cfg, FOUND, Layout.of(cfg, 1), Texts(18, 0, {}))
    assert f"On a CPU the first rank's process takes {amount(FOUND.resident)} with what it copies for saving;" in said[-1]
    assert "Highest: 100.0 MiB of tensors, in this part and pass: qformer, forward." in said
