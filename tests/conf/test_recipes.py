"""The values that decide about results are those of the paper and of LAVIS's recipes."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest

from blip2x.config.compose import CONF_FOLDER, compose_config
from blip2x.config.model import Missing
from blip2x.config.run import RunConfig
from blip2x.config.task import DecodingConfig
from blip2x.models.weights.describe import follow_source
from blip2x.registry import TASKS

EXPERIMENTS = sorted((CONF_FOLDER / "experiment").glob("*.yaml"))
FULL_SIZE = [path.stem for path in EXPERIMENTS if not path.stem.startswith(("digits", "sweep", "search"))]
RANKS = 16  # of the paper and of LAVIS
PAIRS = {"coco": 566_747, "coco_vg": 566_747 + 821_774}
IMAGES = {"coco": 113_287, "coco_vg": 113_287 + 100_000}  # of Visual Genome about 100,000 (BLIP, table of data sets)


def experiment(name: str, *overrides: str) -> RunConfig:
    return compose_config([f"experiment={name}", *overrides])


def pairs_per_step(config: RunConfig) -> int:
    return config.task.batch_size * config.task.accumulate * RANKS


def schedule(config: RunConfig) -> tuple[float, ...]:
    return tuple(getattr(config.optim, name) for name in ("lr", "warmup_start_lr", "warmup_steps", "eta_min"))


def adamw(config: RunConfig) -> tuple[float, ...]:
    return tuple(getattr(config.optim, name) for name in ("beta1", "beta2", "eps", "weight_decay"))


@pytest.mark.parametrize("dataset", ["coco", "coco_vg"])
@pytest.mark.parametrize(("task", "pairs"), [("pretrain_stage1", 1600), ("pretrain_stage2", 1024)])
def test_pretraining(dataset, task, pairs):
    config = compose_config([f"task={task}", f"dataset={dataset}", "model=opt2.7b"])
    assert schedule(config) == (1e-4, 1e-6, 2000, 1e-5) and adamw(config) == (0.9, 0.98, 1e-8, 0.05)
    assert pairs_per_step(config) == pairs and config.task.max_txt_len == 32 and config.optim.clip_grad_norm is None
    assert config.task.max_epochs * IMAGES[dataset] == pytest.approx(10 * PAIRS[dataset], rel=0.02)  # LAVIS's 10 epochs
    assert config.model.vision.image_size == 224 and config.model.vision.frozen
    transform = config.dataset.transform
    assert (transform.crop_scale, transform.flip) == ([0.5, 1.0], True)
    assert transform.mean == [0.48145466, 0.4578275, 0.40821073] and transform.std == [0.26862954, 0.26130258, 0.27577711]


def test_stage1_weighs_its_losses_alike():
    task = compose_config(["task=pretrain_stage1"]).task
    assert (task.itc_weight, task.itm_weight, task.lm_weight, task.label_smoothing) == (1, 1, 1, 0.1)
    assert compose_config(["task=pretrain_stage1", "dataset=coco"]).task.contrast_steps == 0


@pytest.mark.parametrize(
    "dataset", ["dataset=coco", "dataset=coco_vg", "dataset=coco_vg_ccs_laion", "dataset=vg", "dataset=custom"]
)
def test_stage2_without_an_experiment_splits_captions(dataset):
    config = compose_config(
        ["task=pretrain_stage2", "model=flant5xl", dataset, *(["dataset.images=x"] * ("custom" in dataset))]
    )
    assert config.task.prefix_split


@pytest.mark.parametrize("model", ["opt2.7b", "opt6.7b", "flant5xl", "flant5xxl", "opt2.7b_vitl", "flant5xl_vitl"])
def test_stage2_splits_captions_for_encoder_decoders(model):
    config = experiment(f"pretrain_stage2_{model}")
    assert config.model.name == model and config.dataset.name == "coco_vg" and config.task.prompt == ""
    assert config.task.prefix_split  # of which a decoder takes no notice


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("pretrain_stage1_vitg", 1680),
        ("pretrain_stage1_vitl", 2320),
        ("pretrain_stage2_opt6.7b", 1920),
        ("pretrain_stage2_flant5xxl", 1520),
    ],
)
def test_the_papers_own_length(name, pairs):
    (words,) = re.findall("^# Paper: (.*)$", (CONF_FOLDER / "experiment" / f"{name}.yaml").read_text(), re.MULTILINE)
    config = experiment(name, *words.split())
    assert pairs_per_step(config) == pairs and config.task.max_steps == (250_000 if "stage1" in name else 80_000)
    assert config.optim.eta_min == (1e-5 if "stage1" in name else 5e-5) and config.optim.warmup_steps == 2000


@pytest.mark.parametrize("model", ["opt2.7b", "opt6.7b", "flant5xl"])
@pytest.mark.parametrize("tuned", ["", "ft_"])
def test_captioning(model, tuned):
    config = experiment(f"caption_coco_{tuned}{model}")
    task, vision = config.task, config.model.vision
    assert config.model.name == model and vision.image_size == 364 and vision.drop_path_rate == 0
    assert (task.prompt, task.num_beams, task.min_new_tokens, task.max_new_tokens) == ("a photo of", 5, 8, 30)
    assert (task.length_penalty, task.repetition_penalty, task.do_sample) == (1.0, 1.0, False)
    assert (task.train, vision.frozen, vision.recompute) == ((True, False, True) if tuned else (False, True, False))


@pytest.mark.parametrize("model", ["opt2.7b", "opt6.7b", "flant5xl"])
def test_nocaps_is_captioned_as_coco_is(model):
    nocaps, coco = experiment(f"nocaps_zeroshot_{model}"), experiment(f"caption_coco_{model}")
    written = [field.name for field in fields(DecodingConfig)] + ["prompt", "metrics", "train"]
    assert all(getattr(nocaps.task, name) == getattr(coco.task, name) for name in written)
    assert nocaps.model == coco.model and nocaps.model.vision.image_size == 364
    assert (nocaps.dataset.name, nocaps.dataset.eval_split) == ("nocaps", "val")


@pytest.mark.parametrize("model", ["opt2.7b", "opt6.7b", "flant5xl"])
def test_captioning_fine_tuning(model):
    config = experiment(f"caption_coco_ft_{model}")
    assert schedule(config) == (1e-5, 1e-8, 1000, 0.0) and adamw(config) == (0.9, 0.999, 1e-8, 0.05)
    assert pairs_per_step(config) == 256 and config.task.max_txt_len == 32
    assert config.task.max_epochs * IMAGES["coco"] == pytest.approx(5 * PAIRS["coco"], rel=0.02)


# The paper's tables 7 to 9: rate, warm-up, beta1, beta2, weight decay, layer decay. Where the rate starts (1e-8) and ends (0)
# is LAVIS's: caption_coco_ft.yaml, retrieval_coco_ft.yaml.
FINE_TUNING = {
    "finetune_caption": (1e-5, 1000, 0.9, 0.999, 0.05, 1.0),
    "finetune_caption_opt6.7b": (1e-5, 1000, 0.9, 0.999, 0.05, 0.95),
    "finetune_vqa": (1e-5, 1000, 0.9, 0.999, 0.05, 0.95),
    "finetune_vqa_opt6.7b": (1e-5, 1000, 0.9, 0.999, 0.05, 0.9),
    "finetune_retrieval": (1e-5, 1000, 0.9, 0.999, 0.05, 0.95),
    "finetune_retrieval_vitl": (5e-6, 1000, 0.9, 0.98, 0.05, 1.0),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_rates(name):
    optim = compose_config(["task=convert", "model=opt2.7b", f"optim={name}"]).optim
    found = (optim.lr, optim.warmup_steps, optim.beta1, optim.beta2, optim.weight_decay, optim.layer_decay)
    assert found == FINE_TUNING[name]
    assert (optim.warmup_start_lr, optim.eta_min, optim.eps, optim.clip_grad_norm) == (1e-8, 0.0, 1e-8, None)


def test_every_optimizer_option_is_compared_with_a_table():
    assert {path.stem for path in (CONF_FOLDER / "optim").glob("*.yaml")} == {"adamw", "recipe", *FINE_TUNING}


# each with the task settings of its recipe
TRAININGS = {
    "digits": (["task=pretrain_stage1"], {"batch_size": 64, "max_steps": 300}),
    "coco": (["task=caption", "task.train=true", "dataset=coco"], {"max_epochs": 25, "eval_every": 2000}),
    "coco_vg": (["task=pretrain_stage2", "dataset=coco_vg"], {"max_epochs": 65, "prefix_split": True}),
    "custom": (["task=caption", "task.train=true", "dataset=custom", "dataset.images=photos"], {"max_epochs": 5}),
}


@pytest.mark.parametrize(
    ("training", "name"),
    [
        *(("coco", name) for name in ("adamw", *FINE_TUNING)),
        *((training, "finetune_retrieval_vitl") for training in ("digits", "coco_vg", "custom")),
    ],
)
def test_a_typed_optimizer_replaces_the_recipes_as_a_whole(training, name):
    """And nothing else of the recipe; what is typed key by key wins over both."""
    words, settings = TRAININGS[training]
    words = [*words, "model.vision.frozen=false", f"optim={name}"]
    config, alone = compose_config(words), compose_config(["task=convert", "dataset=coco", f"optim={name}"])
    assert config.optim == alone.optim
    assert {key: getattr(config.task, key) for key in settings} == settings
    assert compose_config([*words, "optim.beta1=0.7"]).optim == replace(alone.optim, beta1=0.7)


def test_without_an_optimizer_typed_the_recipes_is_taken():
    words, _ = TRAININGS["digits"]
    recipe, adamw_alone = compose_config(words).optim, compose_config(["task=convert"]).optim
    assert recipe == replace(adamw_alone, lr=1e-3, warmup_start_lr=0.0, warmup_steps=30, eta_min=1e-4, clip_grad_norm=1.0)
    assert compose_config([*words, "optim=recipe"]).optim == recipe
    coco, _ = TRAININGS["coco"]
    assert compose_config(coco).optim == compose_config(["task=convert", "optim=finetune_caption"]).optim


@pytest.mark.parametrize("name", [name for name in FULL_SIZE if "_ft_" in name])
def test_a_typed_optimizer_replaces_an_experiments(name):
    assert experiment(name, "optim=adamw").optim == compose_config(["task=convert", "optim=adamw"]).optim


@pytest.mark.parametrize(("model", "decay"), [("opt2.7b", 1.0), ("opt6.7b", 0.95), ("flant5xl", 1.0)])
def test_captioning_layer_decay(model, decay):
    tuned = experiment(f"caption_coco_ft_{model}")
    assert tuned.optim.layer_decay == decay
    assert vars(tuned.optim) == {**vars(compose_config(["optim=finetune_caption"]).optim), "layer_decay": decay}


@pytest.mark.parametrize(
    ("vit", "model", "optim"), [("vitg", "opt2.7b", "finetune_retrieval"), ("vitl", "opt2.7b_vitl", "finetune_retrieval_vitl")]
)
def test_retrieval_fine_tuning(vit, model, optim):
    config = experiment(f"retrieval_coco_ft_{vit}")
    vision = config.model.vision
    assert config.optim == compose_config(["task=convert", f"optim={optim}"]).optim
    assert (config.task.kind, config.task.train, config.dataset.name, config.model.name) == ("retrieval", True, "coco", model)
    assert (vision.image_size, vision.frozen, vision.recompute, vision.drop_path_rate) == (364, False, True, 0)
    assert pairs_per_step(config) == 224 and config.task.max_txt_len == 32
    assert config.task.max_epochs * IMAGES["coco"] == pytest.approx(5 * PAIRS["coco"], rel=0.02)
    assert (config.task.itc_weight, config.task.itm_weight, config.task.lm_weight) == (1, 1, 1)
    assert (config.task.k_test, config.task.eval_max_txt_len, config.task.clean_texts) == (128, 35, True)  # LAVIS's search


@pytest.mark.parametrize("dataset", ["coco", "coco_vg"])
@pytest.mark.parametrize("task", ["pretrain_stage1", "pretrain_stage2"])
def test_the_best_checkpoint_is_chosen_by_the_validation_split(dataset, task):
    config = compose_config([f"task={task}", f"dataset={dataset}", "model=opt2.7b"])
    assert (config.dataset.val_split, config.dataset.eval_split) == ("val", "test")
    assert config.task.keep_best == 1 and config.task.best_metric
    assert TASKS.get(task).reads(config) == [("captions", "train"), ("captions", "val")]


@pytest.mark.parametrize("task", ["pretrain_stage1", "pretrain_stage2"])
def test_pretraining_has_no_layer_decay(task):
    assert compose_config([f"task={task}", "model=opt2.7b", "dataset=coco_vg"]).optim.layer_decay == 1.0


def test_fine_tuning_on_other_data_has_the_same_rates():
    coco, *others = (
        compose_config(["task=caption", "task.train=true", "dataset.name=x", *words])
        for words in (["dataset=coco"], ["dataset=coco_vg"], ["dataset=custom", "dataset.images=photos"])
    )
    assert all(other.optim == coco.optim for other in others)


# the paper's table 2: accuracy on VQAv2 val, OK-VQA val and GQA testdev
VQA = {
    "opt2.7b_vitl": (50.1, 30.2, 33.9),
    "opt2.7b": (53.5, 31.7, 34.6),
    "opt6.7b": (54.3, 36.4, 36.4),
    "flant5xl_vitl": (62.6, 39.4, 44.4),
    "flant5xl": (63.1, 40.7, 44.2),
    "flant5xxl": (65.2, 45.9, 44.7),
}
QUESTIONS = {"vqav2": "val", "okvqa": "val", "gqa": "testdev"}


@pytest.mark.parametrize("dataset", QUESTIONS)
@pytest.mark.parametrize("model", VQA)
def test_vqa(model, dataset):
    config = experiment(f"{dataset}_zeroshot_{model}")
    said = (CONF_FOLDER / "experiment" / f"{dataset}_zeroshot_{model}.yaml").read_text()
    assert f"accuracy {VQA[model][list(QUESTIONS).index(dataset)]} % on {QUESTIONS[dataset]}" in said
    assert (config.dataset.name, config.dataset.eval_split) == (dataset, QUESTIONS[dataset])
    assert config.dataset.parts[dataset].splits[QUESTIONS[dataset]].questions
    task = config.task
    assert config.model.name == model and config.model.vision.image_size == 224
    assert task.prompt == ("Question: {} Answer:" if model.startswith("opt") else "Question: {} Short answer:")
    assert (task.num_beams, task.length_penalty, task.min_new_tokens, task.max_new_tokens) == (5, -1.0, 1, 10)
    assert (task.repetition_penalty, task.do_sample, task.early_stopping) == (1.0, False, False)


@pytest.mark.parametrize(
    ("model", "optim"), [("opt2.7b", "finetune_vqa"), ("opt6.7b", "finetune_vqa_opt6.7b"), ("flant5xl", "finetune_vqa")]
)
def test_vqa_fine_tuning(model, optim):
    config = experiment(f"vqav2_ft_{model}")
    task, vision = config.task, config.model.vision
    assert config.optim == compose_config(["task=convert", f"optim={optim}"]).optim
    assert (task.kind, config.dataset.name, config.model.name) == ("vqa_finetune", "vqav2_vg", model)
    assert (vision.image_size, vision.frozen, vision.recompute, vision.drop_path_rate) == (490, False, True, 0)
    assert pairs_per_step(config) == 128 and (task.max_epochs, task.max_steps, task.train) == (5, None, True)
    assert (task.prompt, task.num_beams, task.keep_best) == ("Question: {} Answer:", 5, 0)
    assert config.model.qformer.weights == "blip2_pretrained.pth"  # stage 1's: BERT has never seen an image


def test_every_model_is_asked_in_its_own_way_unless_told_otherwise():
    assert compose_config(["task=vqa_zeroshot", "model=opt2.7b"]).task.prompt == "Question: {} Answer:"
    assert compose_config(["task=vqa_zeroshot", "model=tiny_opt"]).task.prompt == "Question: {} Short answer:"
    assert compose_config(["task=vqa_zeroshot", "model=opt2.7b", "task.prompt='{}?'"]).task.prompt == "{}?"


LANGUAGE = {  # width, depth, heads, inner width, vocabulary
    "opt2.7b": (2560, 32, 32, 10240, 50272),
    "opt6.7b": (4096, 32, 32, 16384, 50272),
    "flant5xl": (2048, 24, 32, 5120, 32128),
    "flant5xxl": (4096, 24, 64, 10240, 32128),
}
VISION = {"": ("eva_vit", 1408, 39, 16, 6144, 14), "_vitl": ("clip_vit", 1024, 23, 16, 4096, 14)}


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("suffix", VISION)
def test_full_size_models(name, suffix):
    model = compose_config([f"model={name}{suffix}"]).model
    assert model.ln_vision_eps is None and model.missing is Missing.error  # the weights' origin says how they are computed
    model = follow_source(model, None)  # and without one it is as in LAVIS
    lm, vision, qformer = model.language, model.vision, model.qformer
    depth = lm.depth if name.startswith("opt") else lm.encoder_depth
    assert (lm.width, depth, lm.num_heads, lm.mlp_width, lm.vocab_size) == LANGUAGE[name] and lm.frozen and lm.dropout == 0.1
    if name.startswith("opt"):
        assert lm.max_positions == 2048
    else:
        assert lm.decoder_depth == 24 and lm.activation.value == "gelu"  # exact: what LAVIS sets, not what FlanT5 says
        assert (lm.head_width, lm.relative_buckets, lm.relative_max_distance) == (64, 32, 128)
    shape = (vision.kind, vision.width, vision.depth, vision.num_heads, vision.mlp_width, vision.patch_size)
    assert shape == VISION[suffix] and vision.frozen and not getattr(vision, "key_bias", False)
    assert (qformer.num_queries, qformer.width, qformer.depth, qformer.num_heads, qformer.mlp_width) == (32, 768, 12, 12, 3072)
    assert (qformer.cross_attention_every, qformer.vocab_size, qformer.embed_dim, qformer.dropout) == (2, 30523, 256, 0.1)
    assert (model.name, model.temperature, model.ln_vision_eps) == (f"{name}{suffix}", 0.07, 1e-5)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_commands_in_an_experiments_comment_are_this_experiments(path: Path):
    commands = re.findall(r"^# Run: .*runners/run\.py (.*)$", path.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == f"experiment={path.stem}"
        compose_config(words)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_experiments_share_the_work_between_ranks(name):
    assert experiment(name).parallelism.dp == -1


def test_digits_t5_is_the_demo_with_another_model():
    demo, t5 = compose_config([]), experiment("digits_t5")
    assert t5.model.name == "tiny_t5" and (t5.task.kind, t5.task.stages) == (demo.task.kind, demo.task.stages)
    assert t5.dataset == demo.dataset and t5.optim == demo.optim


def test_the_papers_mixtures():
    """Its data for pre-training, all images alike, and for fine-tuning on VQA: both of VQAv2's splits and Visual Genome."""
    pretraining = compose_config(["dataset=coco_vg_ccs_laion"]).dataset
    assert {name: part.weight for name, part in pretraining.parts.items()} == dict.fromkeys(("coco", "vg", "ccs", "laion"), 1.0)
    assert (pretraining.val_split, pretraining.eval_split) == ("val", "test")
    vqa = compose_config(["dataset=vqav2_vg"]).dataset
    trained_on = {name: Path(part.splits["train"].questions).name for name, part in vqa.parts.items()}
    assert trained_on == {
        "vqav2": "v2_OpenEnded_mscoco_train2014_questions.json",
        "vqav2_val": "v2_OpenEnded_mscoco_val2014_questions.json",
        "vg_qa": "vg_qa.json",
    }
    assert [name for name, part in vqa.parts.items() if vqa.eval_split in part.splits] == ["vqav2"]


@pytest.mark.parametrize("dataset", ["vqav2", "vqav2_vg", "okvqa", "gqa", "custom"])
def test_fine_tuning_on_questions_has_the_papers_rates_without_an_experiment(dataset):
    """Of a frozen image encoder nothing decays by block; answers are scored as zero-shot ones are."""
    words = [f"dataset={dataset}", "model=opt2.7b", *(["dataset.images=x"] if dataset == "custom" else [])]
    tuned = compose_config(["task=vqa_finetune", *words])
    assert tuned.optim == replace(compose_config(["task=convert", "optim=finetune_vqa"]).optim, layer_decay=1.0)
    zeroshot = compose_config(["task=vqa_zeroshot", *words]).task
    assert (tuned.task.answer_rules, tuned.task.lemmatise) == (zeroshot.answer_rules, zeroshot.lemmatise)
    assert tuned.task.keep_best == (0 if dataset == "vqav2_vg" else 1)


@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_fine_tuning_on_flickr30k_is_as_on_coco(task):
    words = [f"task={task}", "task.train=true", "model=opt2.7b", "model.vision.frozen=false"]
    flickr30k, coco = (compose_config([*words, f"dataset={name}"]) for name in ("flickr30k", "coco"))
    assert flickr30k.optim == coco.optim and flickr30k.optim.lr == 1e-5
    assert (flickr30k.task.max_epochs, flickr30k.task.keep_best) == (25, 1)
