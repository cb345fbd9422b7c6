"""Predicted memory beside what the training loop takes on a CPU, where paddle counts every tensor."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict, replace

import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.models.memory.ghosts import Ghost, Node, Tracer, call
from blip2x.models.memory.passes import VisionPass
from blip2x.models.memory.predict import FULL, Layout, predict
from blip2x.models.vision._blocks import drop_path
from blip2x.models.vision.clip_vit import quick_gelu
from blip2x.parallel.degrees import Degrees
from blip2x.tasks.checkup.examined import looked_at
from blip2x.tasks.checkup.memory import model_of
from tests.full_size.memory import allocated, forget_most, most_allocated, step

SHARE = 0.05  # of what is measured, that the prediction may be off; it is 4 % at most, and a forgotten layer costs more
T5 = "model=tiny_t5"
FEW = "'task.batch_size=16'"  # of what is measured twice, with and without an option
SMALL_CLIP = [
    "model.vision.width=96", "model.vision.depth=3", "model.vision.num_heads=2", "model.vision.mlp_width=768",
    "model.vision.image_size=56",
]  # fmt: skip
STEPS = {
    "vision": ["task.of=pretrain_vision"],
    "language, OPT": ["task.of=pretrain_language"],
    "language, T5": ["task.of=pretrain_language", T5],
    "stage 1": ["task.of=pretrain_stage1"],
    "stage 2, OPT": ["task.of=pretrain_stage2"],
    "stage 2, T5": ["task.of=pretrain_stage2", T5],
    "caption, OPT": ["task.of=caption", "task.overrides=['task.train=true']"],
    "caption, T5": ["task.of=caption", "task.overrides=['task.train=true']", T5],
    "stage 1, ViT trained": ["task.of=pretrain_stage1", "model.vision.frozen=false", f"task.overrides=[{FEW}]"],
    "stage 1, all again": [
        "task.of=pretrain_stage1", "model.vision.frozen=false", "model.vision.recompute=true", "model.qformer.recompute=true",
        f"task.overrides=[{FEW}]",
    ],
    "stage 2, ViT trained": ["task.of=pretrain_stage2", "model.vision.frozen=false", "model.vision.image_size=96"],
    "stage 2, ViT again": [
        "task.of=pretrain_stage2", "model.vision.frozen=false", "model.vision.image_size=96", "model.vision.recompute=true",
    ],
    "stage 2, all again": [
        "task.of=pretrain_stage2", T5, "model.qformer.recompute=true", "model.language.recompute=true",
    ],
    "questions, OPT": ["task.of=vqa_finetune"],
    "questions, T5": ["task.of=vqa_finetune", T5, "model.vision.frozen=false", f"task.overrides=[{FEW}]"],
    "questions, ViT again": [
        "task.of=vqa_finetune", "model.vision.frozen=false", "model.vision.image_size=96", "model.vision.recompute=true",
        "model.qformer.recompute=true", "model.qformer.dropout=0.1", f"task.overrides=[{FEW}]",
    ],
    "image encoder, drop path": [
        "task.of=pretrain_vision", "model.vision.drop_path_rate=0.3", "model.vision.mlp_width=48", "model.vision.depth=6",
    ],
    "image encoder, CLIP": ["task.of=pretrain_vision", "model/vision=clip_vit_l", *SMALL_CLIP],
    "stage 1, cached contrast": [
        "task.of=pretrain_stage1", "model.qformer.dropout=0.1",
        "task.overrides=['task.batch_size=8','task.accumulate=3','task.cached_contrast=true']",
    ],
}  # fmt: skip


SMALL_STEP = [
    "task.of=pretrain_vision", "model.vision.width=192", "model.vision.depth=6", "model.vision.mlp_width=768",
    "task.overrides=['task.batch_size=2']",
]  # fmt: skip


def training(*words: str):
    """The config of the one training that `words`, of a doctor's command, look at."""
    (wanted,) = looked_at(
        compose_config(["task=doctor", "dataset.train_scenes=64", "dataset.test_scenes=12", *words]).task
    ).values()
    return wanted.cfg


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_a_step_takes_what_is_predicted(words):
    found, measured = step(training(*words))
    assert found.peak == pytest.approx(measured, rel=SHARE)


SIDE = 64
OPERATIONS = {  # paddle's, the ghosts', for a tensor [SIDE, SIDE]
    "gelu": (nn.functional.gelu, lambda t, x: t.elementwise(x, keep=True)),
    "softmax": (nn.functional.softmax, lambda t, x: t.softmax(x)),
    "relu": (nn.functional.relu, lambda t, x: t.elementwise(x, keep_result=True)),
    "sigmoid": (nn.functional.sigmoid, lambda t, x: t.elementwise(x, keep_result=True)),
    "rsqrt": (paddle.rsqrt, lambda t, x: t.elementwise(x, keep_result=True)),
    "norm": (nn.LayerNorm(SIDE), lambda t, x: t.norm(x)),
    "maximum": (lambda x: x.max(axis=0), lambda t, x: t.reduce(x, (SIDE,), keep=True)),
    "product": (lambda x: x * x, lambda t, x: t.multiply(x, x)),
    "scaled": (lambda x: 2 * x, lambda t, x: t.elementwise(x)),
    "residual sum": (lambda x: x + nn.functional.gelu(x), lambda t, x: t.add(x, t.elementwise(x, keep=True))),
    "matrix product": (lambda x: paddle.matmul(x, x), lambda t, x: t.matmul(x, x, x.shape)),
    "slice": (lambda x: x[: SIDE // 2], lambda t, x: t.transpose(x, (SIDE // 2, SIDE))),
    "view": (lambda x: x.reshape([-1]), lambda t, x: t.view(x, (SIDE * SIDE,))),
    "concatenation": (lambda x: paddle.concat([x, x]), lambda t, x: t.concat([x, x], (2 * SIDE, SIDE))),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5), lambda t, x: t.dropout(x, 0.5)),
    "quick GELU": (quick_gelu, lambda t, x: VisionPass(t, None)._quick_gelu(x)),
    "drop path": (
        lambda x: drop_path(x.unsqueeze(1), 0.5, training=True),
        lambda t, x: VisionPass(t, None)._drop(t.view(x, (SIDE, 1, SIDE)), 0.5),
    ),
    "in a row": (
        lambda x: nn.functional.softmax(nn.functional.gelu(nn.functional.gelu(x))),
        lambda t, x: t.softmax(t.elementwise(t.elementwise(x, keep=True), keep=True)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_ghosts_take_as_much_as_tensors(name):
    """Kept for the backward pass, at most before it, at most in it; in tensors of [SIDE, SIDE]."""
    real, ghostly = OPERATIONS[name]
    leaf = paddle.ones([SIDE, SIDE])
    leaf.stop_gradient = False
    measured = []
    for _ in range(2):  # the first time there is no gradient of `leaf` yet
        before = allocated()
        forget_most()
        loss = real(leaf * 1.0).sum()
        measured = [allocated() - before, most_allocated() - before]
        forget_most()
        loss.backward()
        measured.append(most_allocated() - before)
        del loss

    tracer = Tracer()
    ghost = Ghost((SIDE, SIDE), FULL, tracer.make((0,), FULL).memory, Node("", []))
    loss = tracer.reduce(ghostly(tracer, tracer.elementwise(ghost)), (1,))
    predicted = [tracer.ledger.total, tracer.ledger.peak]
    tracer.ledger.peak = 0
    tracer.backward(loss.node)
    predicted.append(tracer.ledger.peak)
    unit = SIDE * SIDE * FULL
    assert [p / unit for p in predicted] == pytest.approx(
        [m / unit for m in measured], abs=0.05
    )  # gradients of a norm's weights
    del loss, ghost
    assert tracer.ledger.total == 0


def test_recomputing_keeps_what_goes_in_alone():
    def twice(x):
        return t.elementwise(t.elementwise(x, keep=True), keep=True)

    kept = {}
    for way in ("call", "recompute"):
        t = Tracer()
        x = t.make((SIDE, SIDE), FULL, node=Node("", []))
        out = call(twice, x) if way == "call" else t.recompute(twice, x)
        kept[way] = t.ledger.total
        loss = t.reduce(out, (1,))
        del x, out
        t.backward(loss.node)
        del loss
        assert t.ledger.total == 0
    unit = SIDE * SIDE * FULL
    assert kept == {"call": 3 * unit, "recompute": 2 * unit}  # what goes in and out, and what is between


@pytest.fixture(scope="module")
def stage2():
    """`stage2(*overrides, layout=...)` -> prediction of stage 2 at full size."""

    def find(*overrides: str, layout: Layout = Layout(Degrees(1, 1))):  # noqa: B008
        cfg = compose_config(["task=pretrain_stage2", "model=opt2.7b", "dataset=coco", "task.batch_size=2", *overrides])
        sizes = {"qformer": 0, "language": 50272}
        key = (cfg.precision.name, layout)
        if key not in models:
            models[key] = model_of(cfg, layout, sizes, {})
        return predict(cfg, models[key], layout, length=32, output_length=0, vocab_sizes=sizes)

    models = {}
    return find


LEARNING = 107_133_696  # tests/models/test_parameter_counts.py


def test_what_is_trained_has_gradients_two_moments_and_a_checkpoint(stage2):
    found = stage2()
    parts = {part.name: part for part in found.parts}
    assert sum(part.trained for part in found.parts) == LEARNING and found.checkpoint == 3 * 4 * LEARNING
    assert found.kept == 4 * sum(part.parameters for part in found.parts) + 3 * 4 * LEARNING
    assert parts["vision"].gradients == parts["vision"].optimizer == parts["language"].optimizer == 0
    assert parts["language"].activations > parts["qformer"].activations > parts["ln_vision"].activations


def test_a_low_precision_halves_frozen_towers(stage2):
    full, low = ({part.name: part for part in stage2(f"precision={name}").parts} for name in ("fp32", "bf16"))
    for name in ("vision", "language"):
        assert low[name].weights == pytest.approx(full[name].weights / 2, rel=0.002)  # norms stay
        assert low[name].types == ("bfloat16", "float32")
    assert low["qformer"].weights == full["qformer"].weights
    assert low["language"].activations < 0.8 * full["language"].activations


@pytest.mark.parametrize(("stage", "divided"), [(1, {"optimizer"}), (2, {"optimizer", "gradients"})])
def test_sharding_divides_what_its_stage_says(stage2, stage, divided):
    one, four = (asdict(stage2(layout=layout).parts[2]) for layout in (Layout(Degrees(1, 1)), Layout(Degrees(1, 4), stage)))
    assert one["name"] == "qformer"
    for what in ("weights", "gradients", "optimizer"):
        assert four[what] == pytest.approx(one[what] / (4 if what in divided else 1), rel=1e-3)


def test_stage_3_cuts_the_big_matrices_of_linear_layers(stage2):
    one, four = (stage2(layout=layout).parts[2] for layout in (Layout(Degrees(1, 1)), Layout(Degrees(1, 4), 3)))
    # feed-forwards and the keys and values of patches have more than 2**20 numbers; 768 x 768 has fewer
    cut = 4 * (12 * 2 * 768 * 3072 + 6 * 2 * 768 * 1408)
    assert one.weights - four.weights == pytest.approx(0.75 * cut, rel=1e-6)
    assert one.optimizer - four.optimizer == pytest.approx(2 * 0.75 * cut, rel=1e-6)


def test_tensor_parallelism_divides_frozen_matrices_and_what_is_between_them(stage2):
    one = {part.name: part for part in stage2().parts}
    two = {part.name: part for part in stage2(layout=Layout(Degrees(1, 1, 2))).parts}
    assert two["language"].weights == pytest.approx(one["language"].weights / 2, rel=0.01)
    assert 0.5 < two["language"].activations / one["language"].activations < 0.85
    assert two["vision"] == one["vision"]
    split = stage2(layout=Layout(Degrees(1, 1, 2), tp_vision=True)).parts[0]
    assert split.weights == pytest.approx(one["vision"].weights / 2, rel=0.01)


def test_clipping_changes_gradients_in_place(stage2):
    assert stage2("optim.clip_grad_norm=1e-6") == stage2("optim.clip_grad_norm=null")
    words = [*SMALL_STEP, "optim.clip_grad_norm=1e-6"]  # weights, gradients and moments are nearly all there is
    found, measured = step(training(*words))
    assert found.peak == pytest.approx(measured, rel=0.01) and found.activations < 0.1 * found.kept


@pytest.mark.parametrize("background", [False, True])
def test_saving_copies_what_is_predicted(background):
    """Copies are numpy's, whose bytes tracemalloc sees; beside them stand one weight at a time and what Python makes."""
    cfg = training(*SMALL_STEP, f"task.overrides=['task.batch_size=2','task.save_in_background={background}']")
    tracemalloc.start()
    found, _ = step(cfg, saves=True)
    copied = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.saving == (3 if background else 2) * FULL * sum(part.trained for part in found.parts)
    assert copied == pytest.approx(found.saving, rel=0.15)


def test_a_process_has_more_than_its_tensors(stage2):
    plain, background = stage2(), stage2("task.save_in_background=true")
    assert plain.resident_elsewhere == plain.peak + plain.beside
    saving = replace(plain, saving=plain.activations + 1000)
    assert saving.resident == plain.resident_elsewhere + 1000 and saving.peak == plain.peak  # after the step, not beside it
    assert replace(plain, saving=plain.activations - 1000).resident == plain.resident_elsewhere
    assert background.resident == background.resident_elsewhere + 3 * 4 * LEARNING  # the next step comes beside it
    assert plain.beside - replace(plain, parts=plain.parts[:-1]).beside > 200 * 2**20  # paddlenlp, and activations


def test_data_parallelism_keeps_what_it_sends(stage2):
    one, two = stage2(), stage2(layout=Layout(Degrees(2, 1)))
    assert two.kept - one.kept == 4 * LEARNING


def test_micro_batches_wait_beside_the_first(stage2):
    assert stage2("task.accumulate=5").batch == 5 * stage2().batch
