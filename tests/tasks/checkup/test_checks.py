"""Each check's verdicts, on tasks that are small, wrong, or at full size without weights."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from paddle import nn
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.config.dataset import OnBadImage
from blip2x.config.run import PrecisionName, RunConfig
from blip2x.data.audit.verdicts import Verdict
from blip2x.data.sequences import Mixture, Samples
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.tasks.checkup import data, machine, texts
from blip2x.tasks.checkup.data import _judge_pictures, check_data
from blip2x.tasks.checkup.examined import Examined, Wanted
from blip2x.tasks.checkup.findings import Findings
from blip2x.tasks.checkup.memory import check_memory
from blip2x.tasks.checkup.parameters import check_parameters, published
from blip2x.tasks.checkup.schedule import check_schedule, plot
from blip2x.tasks.checkup.settings import check_settings
from blip2x.tasks.checkup.texts import check_prompts, check_tokenizers
from blip2x.tasks.checkup.trial import TrialRun, _judge_step, _small, check_start, check_trial

FEW = ["dataset.train_scenes=64", "dataset.test_scenes=12"]
FINE, LOOK, BROKEN = Verdict.fine, Verdict.look, Verdict.broken


@functools.cache
def composed(*words: str) -> RunConfig:
    """Composing takes longer than most checks."""
    return compose_config(list(words))


@pytest.fixture
def examine(run):
    """`examine(*words)` -> the task of these words."""

    def make(*words: str, ranks: int = 1, all_keys: bool = False) -> Examined:
        cfg = composed(*words)
        return Examined(cfg.task.kind, Wanted(cfg, list(words)), run, Layout.of(cfg, ranks), all_keys)

    return make


def verdicts(found: Findings) -> dict[str, Verdict]:
    return {line.check: line.verdict for line in found.lines}


def line(found: Findings, check: str):
    return next(line for line in found.lines if line.check == check)


def test_an_experiment_that_is_overruled_is_worth_a_look(examine, run):
    where = ["paths.data=/elsewhere", "threads=1", "model.weights=/elsewhere"]  # changes no figure, nor do as many beams
    found = check_settings(examine("experiment=vqav2_zeroshot_opt2.7b", "task.answer_rules=vqa", "task.num_beams=5", *where))
    assert verdicts(found) == {"config": FINE, "experiment": LOOK}
    assert line(found, "experiment").found == "task.answer_rules is not as the experiment says"
    rows = (run.folder / "vqa_zeroshot/config_origin.csv").read_text().splitlines()
    wanted = "task.answer_rules,vqa,the command line,conf/experiment/vqav2_zeroshot_opt2.7b.yaml"
    assert rows[0] == "key,value,from,instead of" and wanted in rows
    shown = "\n".join(found.shown)
    assert "task.answer_rules = vqa" in shown and "task.max_new_tokens" not in shown  # the option's own, in the file alone


def test_what_an_experiment_has_from_its_options_is_the_experiments_too(examine):
    words = ["model=opt6.7b", "optim.lr=1e-3", "task.num_beams=2"]
    found = check_settings(examine("experiment=vqav2_zeroshot_opt2.7b", *words, all_keys=True))
    said = line(found, "experiment").found
    assert said.count(", ") == 4 and said.endswith(" and 1 more are not as the experiment says")
    assert {"task.num_beams", "model.name", "model.language.width"} < set(said.split(" and ")[0].split(", "))
    assert any(text.startswith("optim.beta1 = ") for text in found.shown)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["task=pretrain_stage1", "model=opt2.7b_vitl"], FINE),
        (["task=caption", "model=flant5xl", "model.vision.image_size=364"], FINE),
        (["task=pretrain_stage1", "model=opt2.7b", "model.vision.depth=38"], LOOK),
    ],
)
def test_full_size_models_are_compared_with_the_published_counts(examine, words, wanted):
    found = check_parameters(examine(*words, "dataset=coco"))
    assert verdicts(found) == {"parameters": FINE, "published counts": wanted}
    if wanted is LOOK:
        assert "image encoder 960,645,760 instead of 985,894,528" in line(found, "published counts").found


def test_published_parts_make_the_published_sums():
    sums = {"opt2.7b": 3_744_679_936, "opt6.7b": 7_752_738_304, "flant5xl": 3_942_446_592, "flant5xxl": 12_229_596_672}
    model = composed("task=pretrain_stage1", "model=opt2.7b", "dataset=coco").model
    for name, count in sums.items():  # Hugging Face's, which stores a bias of EVA's keys
        assert sum(published(replace(model, name=name), "stage2").values()) == count - 39 * 1408
    assert published(replace(model, name="tiny_opt"), "stage2") is None


def test_parts_of_a_small_model(examine):
    found = check_parameters(examine("task=pretrain_stage1", *FEW))
    parts = found.record["parameters"]
    assert parts["image encoder"]["trained"] == 0 < parts["image encoder"]["frozen"]
    assert parts["Q-Former: cross-attention"]["trained"] > 0 == parts["Q-Former: cross-attention"]["frozen"]
    assert set(parts) >= {"Q-Former: queries", "Q-Former: words and their head", "projections and heads"}
    found = check_parameters(examine("task=vqa_zeroshot", *FEW))
    assert "none of them trained by this task" in line(found, "parameters").found


def test_memory_that_is_not_there_is_broken_here_and_a_look_elsewhere(examine, monkeypatch):
    words = ["task=pretrain_stage1", "parallelism=dp", *FEW]
    assert verdicts(check_memory(examine(*words))) == verdicts(check_memory(examine("task=caption", *FEW))) == {"memory": FINE}
    monkeypatch.setattr("blip2x.tasks.checkup.memory.free_memory", lambda device: (2**20, "on this machine"))
    assert verdicts(check_memory(examine(*words))) == {"memory": BROKEN}
    assert verdicts(check_memory(examine(*words, ranks=2))) == {"memory": LOOK}
    weights = check_memory(examine("task=caption", *FEW))
    assert verdicts(weights) == {"memory": BROKEN} and "3.2 MiB of weights, 1.0 MiB free" in line(weights, "memory").found


def test_a_schedule_is_drawn_and_judged(examine):
    examined = examine("task=pretrain_stage1", *FEW)
    examined.cfg.task.max_steps = 300
    found = check_schedule(examined)
    assert verdicts(found) == {"steps": FINE, "warm-up": FINE}
    assert "300, 300 epochs of 64 samples; 64 samples per step" in line(found, "steps").found
    assert found.shown[0].strip().startswith("0.001 │") and found.shown[-1].endswith("step 300")
    examined.cfg.task.max_steps, examined.cfg.task.save_every = 20, 50
    short = check_schedule(examined)
    assert verdicts(short) == {"steps": FINE, "warm-up": LOOK, "intervals": LOOK}
    assert "task.log_every" not in line(short, "intervals").found


def test_the_published_rate_belongs_to_the_published_batch(examine):
    def rate(accumulate=1, **optim):
        examined = examine("task=pretrain_stage1", "model=opt2.7b", "dataset=coco")
        examined.cfg.task.max_steps, examined.cfg.task.max_epochs, examined.cfg.task.accumulate = 9000, None, accumulate
        examined.cfg.optim = replace(examined.cfg.optim, **optim)
        return line(check_schedule(examined), "learning rate")

    assert rate(accumulate=16).verdict is FINE  # 1,600 of 1,680
    small = rate()
    assert small.verdict is LOOK and "in proportion it would be 6.0e-06" in small.advice
    assert rate(lr=6e-6, eta_min=0.0).verdict is FINE


def test_the_plot_has_its_highest_column_at_the_peak():
    text = plot([0.0, 0.5, 1.0, 0.25], 4)
    assert [row[10:] for row in text[:-2]] == ["  █ ", "  █ ", "  █ ", " ██ ", " ██▄", " ███"]
    assert plot([2e-4], 1)[-1].endswith("step 1")


def test_without_annotations_a_data_set_is_not_ready_and_with_bad_ones_it_is_broken(examine, tmp_path):
    found = check_data(examine("task=caption", "dataset=coco", f"paths.data={tmp_path}"))
    assert verdicts(found) == {"eval captions": LOOK}
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.json").write_text("[{")
    own = ["dataset=custom", f"dataset.images={tmp_path}/images", f"dataset.eval_captions={tmp_path}/captions.json"]
    found = check_data(examine("task=caption", *own, f"paths.cache={tmp_path}/cache"))
    assert verdicts(found) == {"eval captions": BROKEN}


def test_pictures_that_do_not_open_are_broken(examine, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "captions.json").write_text('[{"image": "a.png", "caption": "noise"}]')
    own = ["dataset=custom", f"dataset.images={tmp_path}", f"dataset.eval_captions={tmp_path}/captions.json"]
    examined = examine("task=caption", *own, f"paths.cache={tmp_path}/cache")
    found = check_data(examined)
    assert verdicts(found)["eval captions"] is BROKEN and "1 cannot be used" in line(found, "eval captions").found
    samples, cfg = list(examined.source.captions("eval")), examined.cfg
    cfg.dataset.on_bad_image = OnBadImage.skip
    for more, wanted in (
        ([], BROKEN),
        ([SimpleNamespace(image=SimpleNamespace(open=lambda: None))], LOOK),
    ):  # all are bad, or not
        _judge_pictures(found := Findings("task"), "captions", [*samples, *more], cfg)
        assert verdicts(found) == {"captions": wanted}
    assert line(found, "captions").advice == "task=audit finds all of them"


def test_annotations_without_their_images_are_not_ready(examine, tmp_path):
    folder = tmp_path / "coco/annotations"
    folder.mkdir(parents=True)
    (folder / "coco_karpathy_test.json").write_text(
        '[{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a cat"]}]'
    )
    found = check_data(examine("task=caption", "dataset=coco", f"paths.data={tmp_path}", f"paths.cache={tmp_path}/cache"))
    assert verdicts(found) == {"eval captions": LOOK}
    assert line(found, "eval captions").advice == "task=prepare fetches what may be fetched"


def test_scenes_are_fine(examine):
    found = check_data(examine("task=pretrain_vision", *FEW))
    assert verdicts(found) == {"train labels": FINE, "eval labels": FINE, "left to task=audit": FINE}
    found = check_data(examine("task=pretrain_stage1", *FEW))
    assert line(found, "train captions").found == "64 samples; 32 pictures opened"


def test_tokenizers_and_lengths(examine):
    examined = examine("task=pretrain_stage1", *FEW)
    examined.cfg.task.max_txt_len = 6
    found = check_tokenizers(examined)
    assert verdicts(found) == {"Q-Former's tokenizer": FINE, "lengths for the Q-Former": LOOK}
    assert "caption's begin '[DEC]'" in line(found, "Q-Former's tokenizer").found
    assert "are cut at task.max_txt_len=6" in line(found, "lengths for the Q-Former").found
    away = check_tokenizers(examine("task=pretrain_stage2", "model=opt2.7b", "dataset=coco"))
    assert verdicts(away) == {"language model's tokenizer": LOOK}


@pytest.mark.parametrize(
    ("task", "given"),
    [("pretrain_stage2", "''"), ("pretrain_stage2", "a photo of"), ("vqa_finetune", "'question : {} answer :'")],
)
def test_a_prompt_and_an_answer_take_their_room(examine, task, given):
    examined = examine(f"task={task}", f"task.prompt={given}", *FEW)
    tokenizer, source = examined.tokenizers["language"], examined.source
    if task == "vqa_finetune":
        samples = source.questions("train")
        whole = [examined.cfg.task.prompt.format(s.question) + " " + max(s.answers, key=len) for s in samples]
    else:
        whole = [f"{examined.cfg.task.prompt} {caption}" for s in source.captions("train") for caption in s.captions]
    longest = max(len(tokenizer.tokens(text)) for text in whole) + 2
    found = line(check_tokenizers(examined), "lengths for the language model").found
    assert int(found.split()[-2]) == longest


def test_published_vocabularies_have_their_numbers():
    def judged(family, size, **ids):
        found = Findings("task")
        numbers = {"bos_id": None, "end_id": None, "pad_id": None, "dec_id": None, **ids}
        texts._judge_tokenizer(found, "it", SimpleNamespace(family=family, vocab_size=size, **numbers), 50_272)
        return found.lines[0]

    assert judged("opt", 50_265, pad_id=1, bos_id=2, end_id=50_118).verdict is FINE
    wrong = judged("opt", 50_265, pad_id=1, bos_id=2, end_id=2)  # </s> instead of the line break
    assert wrong.verdict is BROKEN and "published weights have end 50118" in wrong.found
    assert judged("t5", 32_100, pad_id=0, end_id=1).verdict is FINE
    assert judged("t5", 60_000, pad_id=0, end_id=1).verdict is BROKEN  # more words than the model has


def test_prompts_are_shown_as_token_numbers(examine):
    prompt = "task.prompt='question: {} short answer: '"
    found = check_prompts(examine("task=vqa_zeroshot", prompt, *FEW))
    assert verdicts(found) == {"blanks of the prompt": FINE, "what the models read": FINE}
    read = found.record["prompts"]["the language model, to write behind"]
    assert read["tokens"][:3] == ["</s>", "question", ":"] and read["tokens"][-1] == ":" and len(read["ids"]) > 6
    found = check_prompts(examine("task=pretrain_stage2", "model=tiny_t5", *FEW))
    assert set(found.record["prompts"]) == {
        "the language model in training, its encoder",
        "the language model in training, its decoder",
    }
    found = check_prompts(examine("task=pretrain_language", *FEW))
    assert found.record["prompts"]["the language model"]["tokens"][-1] == "\n"


def test_unknown_words_are_worth_a_look(examine):
    small = train_tokenizer(["a red"], "bert")
    examined = examine("task=pretrain_stage1", *FEW)
    examined.tokenizers = {"qformer": small}
    found = check_tokenizers(examined)
    assert verdicts(found)["Q-Former's unknown words"] is LOOK


def test_where_a_task_would_start(examine, tmp_path):
    found = check_start(examine("task=pretrain_stage2", "model=opt2.7b", "dataset=coco", f"paths.weights={tmp_path}"))
    assert verdicts(found) == {"model.vision.weights": LOOK, "model.language.weights": LOOK, "start": LOOK}
    assert line(found, "model.vision.weights").advice == "it is fetched when the task starts"
    assert "model.weights=null" in found.record["lacks"]
    gone = check_start(examine("task=pretrain_stage2", f"model.weights={tmp_path}/nowhere", *FEW))
    assert verdicts(gone)["model.weights"] is verdicts(gone)["start"] is BROKEN
    assert f"model.weights={tmp_path}/nowhere" in gone.record["lacks"]
    wrong = check_start(examine("task=pretrain_language", "task.best_metric=CIDEr", "task.keep_best=1", *FEW))
    assert verdicts(wrong) == {"start": BROKEN} and "task.best_metric=CIDEr" in line(wrong, "start").found


def test_a_part_that_the_whole_model_brings_is_not_lacking(examine, monkeypatch, tmp_path):
    def refuse(cfg, promised):
        raise UserError("the pictures are normalised otherwise")

    examined = examine("task=pretrain_stage2", f"model.weights={tmp_path}", *FEW)
    monkeypatch.setattr(examined.task_class, "check", refuse)
    found = check_start(examined)
    assert verdicts(found) == {"model.weights": FINE, "start": BROKEN} and "normalised" in line(found, "start").found


def test_a_trial_is_new_and_short(examine, run):
    cfg = composed("task=pretrain_stage1", *FEW)
    small = _small(replace(cfg, resume="auto", prune=replace(cfg.prune, metric="CIDEr")))
    assert (small.resume, small.prune.metric, small.task.max_steps, small.dataset.eval_limit) == ("never", None, 1, 2)
    examined = examine("task=pretrain_stage1", *FEW)
    first = TrialRun(examined)
    first.log_metrics("s", 1, {"lr": 1.0})
    assert first.rows("metrics.jsonl") and not TrialRun(examined).rows("metrics.jsonl")


def test_what_speaks_against_a_trial(examine, monkeypatch):
    def reason(wanted, *words, lacks=()):
        found = check_trial(examine(*words), wanted, list(lacks))
        assert verdicts(found) == {"trial": LOOK}
        return found.lines[0].found

    small = ["task=pretrain_stage1", *FEW]
    assert reason(False, *small) == "not tried: task.steps=false"
    assert reason("auto", *small, lacks=["model.vision.weights=null"]) == "not tried: it lacks model.vision.weights=null"
    half = examine(*small)
    half.cfg.precision.name = PrecisionName.bf16
    assert "precision=bf16 needs a GPU" in check_trial(half, True, []).lines[0].found
    assert "neither trains nor ends with texts" in reason(True, "task=audit", *FEW)
    monkeypatch.setattr("blip2x.tasks.checkup.trial._LARGE", 1000)
    assert "781,909 parameters take minutes on a CPU; task.steps=true tries it" in reason("auto", *small)
    monkeypatch.setattr("blip2x.tasks.checkup.trial.free_memory", lambda device: (2**20, "here"))
    assert "1.0 MiB free here; task.steps=true tries it all the same" in reason("auto", *small)


class Lame(nn.Layer):
    """Of its three weights one is used, one is not, one is frozen."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = (self.create_parameter([2]) for _ in range(3))
        self.frozen.stop_gradient = True


@pytest.mark.parametrize(
    ("factor", "wanted"), [(1.0, "1 of 2 trained tensors have none"), (math.nan, "1 not a finite one: unused")]
)
def test_a_weight_without_a_gradient_is_found(examine, factor, wanted):
    examined = examine("task=pretrain_stage1", *FEW)
    run, model, found = TrialRun(examined), Lame(), Findings("task")
    assert run.begin_training(model) is False  # no checkpoints
    loss = (model.used * factor).sum()
    loss.backward()
    run.log_metrics("s", 1, {"lr": 1.0, "loss": float(loss), "seconds": 1.0})
    _judge_step(found, run, examined)
    assert line(found, "gradients").verdict is BROKEN and wanted in line(found, "gradients").found
    assert line(found, "one step").verdict is (FINE if factor == 1 else BROKEN)
    assert line(found, "frozen parts").verdict is FINE
    model.frozen.stop_gradient = False
    (model.frozen.sum() + model.unused.sum()).backward()
    model.frozen.stop_gradient = True
    _judge_step(again := Findings("task"), run, examined)
    assert line(again, "frozen parts").verdict is BROKEN and "frozen" in line(again, "frozen parts").found
    run.let_go()


def test_weights_that_do_not_move_are_worth_a_look(examine):
    examined = examine("task=pretrain_stage1", *FEW)
    run, model, found = TrialRun(examined), Lame(), Findings("task")
    run.begin_training(model)
    (model.used.sum() + 0 * model.unused.sum()).backward()
    run.log_metrics("s", 1, {"lr": 1.0, "loss": 1.0, "seconds": 1.0})
    _judge_step(found, run, examined)
    assert line(found, "gradients").verdict is LOOK and line(found, "gradients").found.endswith("of zeros: unused")


def test_versions_are_held_against_what_the_package_says(monkeypatch):
    assert set(verdicts(machine.check_versions()).values()) == {FINE}
    monkeypatch.setattr(machine, "_installed", lambda name: {"numpy": "2.1.0"}.get(name))
    found = machine.check_versions()
    said = [line.found for line in found.lines if line.verdict is BROKEN]
    assert any(text.startswith("numpy 2.1.0 is installed, tested: ") for text in said) and "paddlenlp is not installed" in said
    monkeypatch.setattr(machine, "_required", dict)
    assert LOOK in {line.verdict for line in machine.check_versions().lines}


def test_devices(examine):
    examined = examine("task=pretrain_stage1", *FEW)
    assert verdicts(machine.check_devices([examined])) == {"devices": FINE}
    examined.cfg.precision.name, examined.cfg.threads = PrecisionName.bf16, 4096
    found = machine.check_devices([examined])
    assert {line.verdict for line in found.lines} == {FINE, LOOK} and len(found.lines) == 3


def test_only_the_ranks_of_this_machine_need_its_gpus(examine, monkeypatch):
    monkeypatch.setattr(machine.paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(machine.paddle.device.cuda, "device_count", lambda: 1)
    both = [examine("task=pretrain_stage1", "parallelism=dp", *FEW, ranks=2)]
    found = machine.check_devices(both)
    assert "2 ranks on this machine, which has 1 GPUs" in [line.found for line in found.lines]
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "one:1,two:1")
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "two:1")
    assert verdicts(machine.check_devices(both)) == {"devices": FINE}


def test_disks(examine, monkeypatch, tmp_path):
    examined = examine("task=pretrain_stage1", *FEW, f"paths.outputs={tmp_path}/out", f"paths.cache={tmp_path}/cache")
    found = machine.check_disk([examined])
    assert verdicts(found) == {"paths.outputs": FINE, "paths.cache": FINE}
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()  # a check makes nothing
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert verdicts(machine.check_disk([examined])) == {"paths.outputs": BROKEN, "paths.cache": FINE}
    (tmp_path / "file").write_text("")
    found = Findings("machine")
    machine._judge_folder(found, "paths.outputs", tmp_path / "file", 0, "")
    assert found.lines[0].verdict is BROKEN


def test_lines_keep_to_the_width_of_a_terminal_and_a_files_are_whole():
    found = Findings("task", shown=["a [plot]"])
    found.look("check", "word " * 40 + "[brackets]", "do it")
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    found.show(console)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "        a [plot]" and lines[1].startswith("look    check: word word") and max(map(len, lines)) <= 60
    console = Console(file=io.StringIO(), width=60, color_system=None)
    found.show(console)
    assert console.file.getvalue().splitlines()[1].endswith("[brackets] -> do it")


def test_the_size_of_kept_features_is_told_before_anything_is_written(examine, monkeypatch):
    words = ["task=pretrain_stage1", *FEW, "dataset.cache=features", "dataset.transform.flip=true", "dataset.crops=2"]
    found = line(check_data(examine(*words)), "features")
    assert found.verdict is FINE and "140 rows of 10 x 96 in float16 (128 of train captions, 12 of val captions)" in found.found
    assert "262.5 KiB when all is kept" in found.found
    assert line(check_data(examine(*words, "dataset.cache_gb=1e-4")), "features").verdict is BROKEN
    without_validation = line(check_data(examine(*words, "dataset.cache_gb=2.5e-4")), "features")
    assert without_validation.verdict is LOOK
    once = line(check_data(examine(*words, "task.max_steps=null", "task.max_epochs=1")), "features").found
    plain = line(check_data(examine(*words, "dataset.transform.flip=false")), "features").found
    assert "64 of train captions" in once and "64 of train captions" in plain
    assert "features" not in verdicts(check_data(examine("task=pretrain_vision", *FEW, "dataset.cache=features")))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    full = line(check_data(examine(*words)), "features")
    assert full.verdict is BROKEN and "the disk of paths.cache has 1.0 KiB free" in full.found


def test_a_short_training_keeps_as_few_features_as_it_reads(examine):
    words = ["task=pretrain_stage1", *FEW, "dataset.cache=features", "task.max_steps=2", "task.max_epochs=null"]
    found = line(check_data(examine(*words, "task.batch_size=8", "parallelism=dp", ranks=2)), "features").found
    assert "32 of train captions" in found


def test_checkpoints_have_room_beside_the_features(examine, monkeypatch, tmp_path):
    paths = [f"paths.outputs={tmp_path}/out", f"paths.cache={tmp_path}/cache"]
    examined = examine("task=pretrain_stage1", *FEW, "dataset.cache=features", *paths)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 2**30))
    assert line(check_data(examined), "features").verdict is FINE
    monkeypatch.setattr(data, "checkpoints_bytes", lambda examined: 2 * 2**30)
    found = line(check_data(examined), "features")
    assert found.verdict is BROKEN and "2.00 GiB free, of which 2.00 GiB are left to checkpoints" in found.found
    monkeypatch.setattr(data, "same_disk", lambda cache, outputs: False)
    assert line(check_data(examined), "features").verdict is FINE


class Listed(Samples):
    """Those of a list."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def sample(self, place):
        return self.samples[place]

    @property
    def image_id_N(self):
        return np.array([sample.image_id for sample in self.samples])


def test_an_epoch_is_as_long_as_the_weights_of_its_parts_say(examine, monkeypatch):
    words = ["task=pretrain_stage1", *FEW, "task.max_steps=null", "task.max_epochs=2", "task.batch_size=8"]
    examined = examine(*words, "dataset.cache=features")
    samples = Mixture([Listed(examined.source.captions("train"))], [0.25], apart=1)
    monkeypatch.setattr("blip2x.tasks.checkup.schedule.train_samples", lambda examined: samples)
    assert "4, 2 epochs of 16 samples" in line(check_schedule(examined), "steps").found
    assert data._rows_trained(examined, samples) == 32
