"""Counted operations beside what tiny models multiply, and beside published numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.config.run import RunConfig
from blip2x.errors import UserError
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2, join_prefix
from blip2x.models.flops import Work, generation_flops, opt_count, patches, training_flops, vision_count
from blip2x.objectives.answering import AnsweringObjective
from blip2x.objectives.language import LanguageObjective
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.objectives.vision import VisionObjective
from blip2x.parallel.context import Context

ROWS, LENGTH, OUTPUT, QUESTION = 3, 7, 5, 6
# No two widths alike, so that a product's shape says which layer it is of.
SHAPE = [
    "model.vision.width=40", "model.vision.mlp_width=56", "model.qformer.width=48", "model.qformer.mlp_width=72",
    "model.qformer.embed_dim=20", "model.qformer.vocab_size=101", "model.language.mlp_width=88",
    "model.language.vocab_size=103",
]  # fmt: skip


def config(*words: str) -> RunConfig:
    return compose_config([*SHAPE, *words])


@pytest.fixture
def multiplied(monkeypatch):
    """Operations of the products that paddle does, by the shape of the second factor: its inner width and its outer one."""
    from paddle import _C_ops

    counts: Counter[tuple[int, ...]] = Counter()

    def watch(name: str, read: Callable[..., tuple[int, tuple[int, ...]]]) -> None:
        original = getattr(_C_ops, name)

        def counting(*args, **kwargs):
            out = original(*args, **kwargs)
            inner, shape = read(*args, **kwargs)
            counts[shape] += 2 * math.prod(out.shape) * inner
            return out

        monkeypatch.setattr(_C_ops, name, counting)

    def matmul(x, y, transpose_x=False, transpose_y=False):
        inner, outer = (y.shape[-1], y.shape[-2]) if transpose_y else (y.shape[-2], y.shape[-1])
        return inner, (inner, outer)

    watch("matmul", matmul)
    for name in ("linear", "linear_v2"):
        watch(name, lambda x, y, *_: (y.shape[0], tuple(y.shape)))
    # a bias that is added alone comes as a product of inner width 1, which is no layer's
    watch("addmm", lambda _, x, y, *__, **___: (y.shape[0] if y.shape[0] > 1 else 0, tuple(y.shape)))
    watch("conv2d", lambda x, y, *_: (math.prod(y.shape[1:]), tuple(y.shape)))
    return counts


def texts(length: int, name: str = "text_ids_BL", rows: int = ROWS) -> dict[str, paddle.Tensor]:
    ids = paddle.randint(4, 90, [rows, length])
    mask = paddle.ones_like(ids)
    return {name: ids, name.replace("ids", "mask"): mask}


def language_texts(kind: str) -> dict[str, paddle.Tensor]:
    if kind == "opt":
        batch, place = texts(LENGTH), paddle.arange(ROWS * LENGTH).reshape([ROWS, LENGTH])
        label_mask_BL = batch["text_mask_BL"].clone()
        label_mask_BL[:, 0] = 0  # bos, as `Stage2Collate` has it
        return {**batch, "label_mask_BL": label_mask_BL, "target_place_N": place[:, 1:].flatten()}
    return {**texts(LENGTH, "input_ids_BL"), **texts(OUTPUT, "output_ids_BT")}


def images(cfg: RunConfig) -> dict[str, paddle.Tensor]:
    side = cfg.model.vision.image_size
    return {"image_BCHW": paddle.randn([ROWS, 3, side, side]), "image_id_B": paddle.arange(ROWS)}


def forward(found: dict[str, float]) -> float:
    return found["vision"] + found["qformer"] + found["language"]


@pytest.mark.parametrize("vision", ["tiny_vit", "clip_vit_l"])
def test_image_encoder(multiplied, vision):
    words = ["model.vision.depth=3", "model.vision.num_heads=4", "model.vision.image_size=56", "model.vision.patch_size=14"]
    cfg = config(f"model/vision={vision}", *words)
    encoder = build_stage1(cfg.model, vocab_size=0).vision
    objective = VisionObjective(PatchClassifier(encoder, {"shape": 3, "colour": 6}))
    count = patches(cfg.model.vision) - 1
    labels = {f"label_{name}_BP": paddle.zeros([ROWS, count], "int64") for name in ("shape", "colour")}
    objective({**images(cfg), **labels})
    found = training_flops(cfg.model, "pretrain_vision", Work(ROWS, 0, 0), classes=[3, 6])
    assert found["vision"] == sum(multiplied.values())
    assert found["backward"] == 2 * found["vision"]
    assert found["qformer"] == found["language"] == 0


def test_stage1(multiplied):
    cfg = config("task=pretrain_stage1", "task.contrast_steps=0")
    model = build_stage1(cfg.model, vocab_size=0)
    Stage1Objective(model, Context(), cfg.task, dec_id=5)({**images(cfg), **texts(LENGTH)})
    work = Work(ROWS, ROWS, LENGTH)
    found = training_flops(cfg.model, "pretrain_stage1", work)
    assert forward(found) == sum(multiplied.values())
    assert found["backward"] == 2 * found["qformer"]
    looking = math.ceil(cfg.model.qformer.depth / cfg.model.qformer.cross_attention_every)
    keys = 2 * ROWS * patches(cfg.model.vision) * 40 * 2 * 48 * looking
    assert multiplied[40, 48] == keys
    many = training_flops(cfg.model, "pretrain_stage1", work, data_ranks=2)
    scores = 2 * 2 * ROWS * ROWS * cfg.model.qformer.num_queries * 20
    assert forward(many) - forward(found) == keys + scores  # images of other ranks are looked at anew


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
@pytest.mark.parametrize("kind", ["pretrain_stage2", "vqa_finetune"])
def test_reading_queries(multiplied, model, kind):
    cfg = config(f"model={model}")
    asked = kind == "vqa_finetune"
    whole = build_stage2(cfg.model, vocab_size=0, question_vocab_size=0 if asked else None)
    batch = {**images(cfg), **language_texts(cfg.model.language.kind)}
    if asked:
        batch |= texts(QUESTION, "question_ids_BK")
    (AnsweringObjective if asked else Stage2Objective)(whole)(batch)
    work = Work(ROWS, ROWS, LENGTH, OUTPUT if cfg.model.language.kind == "t5" else 0)
    found = training_flops(cfg.model, kind, work, question_tokens=QUESTION)
    assert forward(found) == sum(multiplied.values())


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_language_model_alone(multiplied, model):
    cfg = config(f"model={model}")
    language = build_stage2(cfg.model, vocab_size=0).language
    LanguageObjective(language)(language_texts(cfg.model.language.kind))
    found = training_flops(cfg.model, "pretrain_language", Work(0, ROWS, LENGTH, OUTPUT))
    assert forward(found) == sum(multiplied.values())
    assert found["backward"] == 2 * found["language"]


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_writing(multiplied, model, beams):
    cfg, new = config(f"model={model}"), 6
    whole: Stage2Model = build_stage2(cfg.model, vocab_size=0)
    whole.eval()
    with paddle.no_grad():
        prompt = texts(LENGTH)
        prefix = join_prefix(whole.language, whole.encode(images(cfg)["image_BCHW"]), *prompt.values())
        settings = GenerationSettings(max_new_tokens=new, min_new_tokens=new, num_beams=beams)
        generate(whole.language, prefix, settings, eos_id=2, pad_id=1, start_id=whole.language.start_id)
    found = generation_flops(cfg.model, Work(ROWS, ROWS, LENGTH, new_tokens=new, beams=beams))
    # In one product with the prompt, the queries' part that sees no prompt is multiplied and masked; and the products over a
    # beam's own tokens have room for those that are not written yet.
    assert 0.95 * sum(multiplied.values()) <= forward(found) <= sum(multiplied.values())


def test_backward_leaves_out_what_is_frozen():
    cfg = config()
    work = Work(ROWS, ROWS, LENGTH)
    frozen = training_flops(cfg.model, "pretrain_stage2", work)
    attention = opt_count(cfg.model.language, cfg.model.qformer.num_queries + LENGTH).activations * ROWS
    assert (
        frozen["backward"] == 2 * frozen["qformer"] + frozen["language"] + attention
    )  # both factors of a score get a gradient
    trained = config("model.language.frozen=false", "model.vision.frozen=false")
    everything = training_flops(trained.model, "pretrain_stage2", work)
    assert everything["backward"] == 2 * forward(everything)


def test_images_with_several_questions_are_seen_once():
    cfg = config()
    one = generation_flops(cfg.model, Work(2, 2, LENGTH, new_tokens=3))
    five = generation_flops(cfg.model, Work(2, 10, LENGTH, new_tokens=3))
    assert (five["vision"], five["qformer"]) == (one["vision"], one["qformer"])
    assert one["language"] < five["language"] < 5 * one["language"]  # a decoder reads the queries once, too
    asked = generation_flops(cfg.model, Work(2, 10, LENGTH, new_tokens=3), question_tokens=QUESTION)
    assert asked["qformer"] > 5 * five["qformer"]  # the question goes into the Q-Former


def test_features_that_are_there_take_no_image_encoder():
    cfg = config()
    for kind in ("pretrain_stage1", "pretrain_stage2", "vqa_finetune"):
        seen, kept = (training_flops(cfg.model, kind, Work(images, ROWS, LENGTH)) for images in (ROWS, 0))
        assert kept == {**seen, "vision": 0}


def test_published_numbers():
    opt = compose_config(["model=opt2.7b"])
    # OpenCLIP's docs/model_profile.csv, image side: EVA's ViT-g with all of its 40 blocks, CLIP's ViT-L with its 24
    assert vision_count(replace(opt.model.vision, depth=40)).forward == pytest.approx(534.06e9, rel=0.001)
    clip = compose_config(["model=opt2.7b_vitl"]).model.vision
    assert vision_count(replace(clip, depth=24)).forward == pytest.approx(162.03e9, rel=0.001)
    # Two operations per parameter and token: 2.65 billion in OPT-2.7B without positions
    language = opt.model.language
    head = 2 * language.width * language.vocab_size
    assert opt_count(language, 1).weights + head == pytest.approx(2 * 2.65e9, rel=0.005)


def test_unknown_words_and_tasks_are_said():
    cfg = compose_config(["model.qformer.vocab_size=null"])
    with pytest.raises(UserError, match="vocab_size=null"):
        training_flops(cfg.model, "pretrain_stage1", Work(1, 1, 4))
    found = training_flops(cfg.model, "pretrain_stage1", Work(1, 1, 4), vocab_sizes={"qformer": 50})
    assert found["qformer"] > 0
    with pytest.raises(UserError, match="'predict'"):
        training_flops(cfg.model, "predict", Work(1, 1, 4))
