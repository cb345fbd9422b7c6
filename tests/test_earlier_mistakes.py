"""One test for each mistake that implementations of BLIP-2 before this one made, each with what went wrong there.

All are cheap: models have a few hundred numbers, and what a test needs of the program is called directly.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from PIL import Image
from safetensors.numpy import save_file

from blip2x.config.compose import compose_config
from blip2x.config.dataset import (
    AnnotationFiles,
    CustomConfig,
    DatasetConfig,
    ImageTextConfig,
    ImageTextPart,
    OnBadImage,
    TransformConfig,
)
from blip2x.config.run import Device, OptimConfig, RunConfig
from blip2x.data.collate import LoadedCaption, Stage2Collate
from blip2x.data.sources.custom import Custom
from blip2x.data.sources.image_text import ImageText
from blip2x.data.tokenize import TextTokenizer, train_tokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.losses.itc import similarities
from blip2x.metrics.caption import caption_scores
from blip2x.models.assemblies.stage1 import Stage1Model, build_stage1
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2
from blip2x.models.freeze import freeze, set_train_mode
from blip2x.models.vision._blocks import Attention
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.models.weights.source import open_source
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.optim.build import build_optimizer
from blip2x.optim.schedule import WarmupCosine
from blip2x.parallel.context import Context, TensorGroup
from blip2x.registry import LANGUAGE_MODELS, STRATEGIES, VISION_ENCODERS
from blip2x.tasks.common import captioning
from blip2x.tasks.common.captioning import write_captions, write_texts
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.weights import Weights

TEXTS = ["a photo of a red cat", "a photo of two dogs", "question: what is it? short answer: a dog"]
SMALL = [
    *(f"model.{part}.{key}" for part in ("vision", "qformer", "language") for key in ("num_heads=2", "mlp_width=16")),
    *("model.vision.image_size=8", "model.vision.patch_size=4", "model.vision.width=12", "model.vision.depth=1"),
    *("model.qformer.num_queries=3", "model.qformer.width=12", "model.qformer.depth=2", "model.qformer.embed_dim=6"),
    *("model.language.width=16", "model.ln_vision_eps=1e-5"),
]
FAMILIES = {
    "opt": ["model=tiny_opt", *SMALL, "model.language.depth=1"],
    "t5": ["model=tiny_t5", *SMALL, "model.language.activation=gelu"],
}
SCHEDULE = {"lr": 1e-4, "warmup_start_lr": 1e-6, "warmup_steps": 10, "eta_min": 0.0, "total_steps": 100}


def tiny(family: str, *overrides: str) -> RunConfig:
    return compose_config(["task=caption", *FAMILIES[family], *overrides])


def lively(model: nn.Layer) -> nn.Layer:
    """With weights that make outputs differ, as fresh ones hardly do; in evaluation mode."""
    paddle.seed(0)
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    model.eval()
    return model


def stage1(words: TextTokenizer) -> Stage1Model:
    return lively(build_stage1(tiny("opt").model, vocab_size=words.vocab_size))


def stage2(words: TextTokenizer) -> Stage2Model:
    return lively(build_stage2(tiny(words.family).model, vocab_size=words.vocab_size))


def pictures(count: int) -> paddle.Tensor:
    paddle.seed(1)
    return paddle.randn([count, 3, 8, 8])


def captions_batch(words: TextTokenizer, prompt: str, *captions: str) -> dict[str, np.ndarray]:
    collate = Stage2Collate(None, words, max_txt_len=12, prompt=prompt)
    return collate([LoadedCaption(np.zeros((3, 8, 8), np.float32), number, text) for number, text in enumerate(captions)])


# --- what is learned ---


def test_opt_learns_the_next_token_not_the_one_it_reads():
    """Labels stood beside the inputs, and the loss did not shift them: each position learned to repeat its own token."""
    words = train_tokenizer(TEXTS, "opt")
    model = stage2(words)
    batch = to_tensors(captions_batch(words, "a photo of", "a red cat", "two dogs"))
    loss = float(Stage2Objective(model)(batch)["loss"])

    ids_BL, targets_BL = batch["text_ids_BL"].numpy(), batch["label_mask_BL"].numpy().astype(bool)
    query_BQD = model.encode(batch["image_BCHW"])
    embeds_BSD = paddle.concat([query_BQD, model.language.embed(batch["text_ids_BL"])], axis=1)
    mask_BS = paddle.concat([paddle.ones([2, 3], dtype="int64"), batch["text_mask_BL"]], axis=1)
    log_BSV = F.log_softmax(model.language(embeds_BSD, mask_BS), axis=-1).numpy()
    places = [(b, 3 + at, ids_BL[b, at]) for b, at in np.argwhere(targets_BL)]
    shifted = -np.mean([log_BSV[b, at - 1, token] for b, at, token in places])
    repeating = -np.mean([log_BSV[b, at, token] for b, at, token in places])
    assert loss == pytest.approx(shifted, abs=1e-5) and abs(shifted - repeating) > 0.1


def test_the_prompt_is_not_learned():
    """Captioning was trained on "a photo of" as well as on the caption."""
    words = train_tokenizer(TEXTS, "opt")
    batch = captions_batch(words, "a photo of", "a red cat", "two dogs")
    rows = zip(batch["text_ids_BL"], batch["label_mask_BL"], strict=True)
    learned = [[words.tokenizer.id_to_token(token) for token in ids[mask == 1]] for ids, mask in rows]
    assert learned == [["a", "red", "cat", "\n"], ["two", "dogs", "\n"]]


def test_the_rate_falls_at_every_step():
    """An integer division in the cosine made a staircase of four rates, the peak for a third of the training."""
    schedule = WarmupCosine(**SCHEDULE)
    rates = []
    for _ in range(100):
        rates.append(schedule())
        schedule.step()
    falls = -np.diff(rates[10:])
    assert (falls > 0).all() and falls.max() < 0.02 * SCHEDULE["lr"]


def test_a_restored_schedule_goes_on_where_it_was():
    """The position was kept in an attribute that paddle does not save, so that each resumed training warmed up again."""
    schedule, restored = WarmupCosine(**SCHEDULE), WarmupCosine(**SCHEDULE)
    for _ in range(40):
        schedule.step()
    restored.set_state_dict(json.loads(json.dumps(schedule.state_dict())))
    schedule.step()
    restored.step()
    assert restored() == schedule() != WarmupCosine(**SCHEDULE)()


def test_biases_norms_and_the_temperature_do_not_decay():
    """The list of exempt names held structured names, but paddle asks by its own: everything decayed."""
    model = stage1(train_tokenizer(TEXTS, "bert"))
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    settings = {"warmup_start_lr": 0.1, "warmup_steps": 0, "eta_min": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    optim = OptimConfig(lr=0.1, weight_decay=0.5, clip_grad_norm=None, layer_decay=1.0, **settings)
    optimizer, _ = build_optimizer(optim, model, total_steps=10)
    sum((0 * p).sum() for p in model.parameters()).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not np.array_equal(p.numpy(), before[name])}
    assert moved == {name for name, array in before.items() if array.ndim > 1}
    assert {"temp", "ln_vision.weight", "itm_head.bias", "qformer.text.head_bias"} <= before.keys() - moved


def test_recomputation_is_switched_on_by_its_option(monkeypatch):
    """The flag was set on a config that the image encoder never read, so that it saved no memory."""
    calls, forward = [], Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, hidden: calls.append(1) or forward(self, hidden))
    counts = {}
    for on in ("true", "false"):
        vision = tiny("opt", f"model.vision.recompute={on}", "model.vision.frozen=false").model.vision
        encoder = VISION_ENCODERS.get(vision.kind)(vision)
        freeze(encoder.embeddings)  # without a gradient at the first block's input, paddle's default trains no block
        set_train_mode(encoder)
        calls.clear()
        encoder(pictures(1)).sum().backward()
        counts[on] = len(calls)
        assert encoder.blocks[0].fc1.weight.grad is not None
    assert counts == {"true": 2, "false": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallelism_splits_the_language_model(family):
    """A flag was handed on that no layer looked at, so that each rank held all of it."""
    cfg = tiny(family).model.language
    with paddle.LazyGuard():
        whole, half = (LANGUAGE_MODELS.get(cfg.kind)(cfg, 50) for _ in range(2))
    half.split_over(TensorGroup(rank=0, size=2))
    count, count_of_half = (
        sum(int(np.prod(parameter.shape)) for parameter in model.parameters() if len(parameter.shape) > 1)
        for model in (whole, half)
    )
    positions = 0 if family == "t5" else int(np.prod(whole.opt.embeddings.position_embeddings.weight.shape))
    assert count_of_half - positions == pytest.approx((count - positions) / 2, abs=1)


# --- what is decoded ---


class State(NamedTuple):
    history_N: paddle.Tensor


class Decoder:
    """What follows depends on the last two tokens by a table."""

    start_id = None

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        generator = np.random.default_rng(5)
        self.table = paddle.to_tensor(2 * generator.standard_normal((vocabulary**2, vocabulary)).astype("float32"))

    def prefill(self, prefix_B):
        return self.table[prefix_B], State(prefix_B)

    def step(self, token_N, state):
        history_N = (state.history_N * self.vocabulary + token_N) % self.vocabulary**2
        return self.table[history_N], State(history_N)

    def reorder(self, state, index_N):
        return State(paddle.index_select(state.history_N, paddle.to_tensor(index_N)))


def test_beams_and_their_length_penalty_act():
    """`num_beams=5` and a length penalty stood beside "greedy_search", which reads neither."""
    decoder, prefixes = Decoder(7), paddle.arange(12)

    def texts(**options) -> tuple[np.ndarray, np.ndarray]:
        out = generate(decoder, prefixes, GenerationSettings(max_new_tokens=6, **options), eos_id=1, pad_id=0)
        return out.ids, (out.ids != 0).sum(axis=1)

    greedy, short, long = texts(), texts(num_beams=4, length_penalty=-2.0), texts(num_beams=4, length_penalty=3.0)
    assert greedy[0].tolist() != long[0].tolist()
    assert (short[1] <= long[1]).all() and short[1].sum() < long[1].sum()
    task = compose_config(["task=vqa_zeroshot", "task.num_beams=3", "task.length_penalty=-0.5"]).task
    settings = GenerationSettings.from_config(task)
    assert (settings.num_beams, settings.length_penalty) == (3, -0.5)


@pytest.mark.parametrize(("family", "end"), [("opt", "\n"), ("t5", "</s>")])
def test_each_language_model_ends_with_its_own_token(family, end, monkeypatch):
    """The number of OPT's line break, 50118, ended texts of every model; T5 has no such token."""
    words = train_tokenizer(TEXTS, family)
    model, asked = stage2(words), []

    def watched(*arguments, **named):
        asked.append(named)
        return generate(*arguments, **named)

    monkeypatch.setattr(captioning, "generate", watched)
    write_texts(model, words, model.encode(pictures(1)), ["a photo of"], GenerationSettings(max_new_tokens=3, min_new_tokens=2))
    assert words.tokenizer.id_to_token(asked[0]["eos_id"]) == end
    assert asked[0]["pad_id"] == words.tokenizer.token_to_id("<pad>")


def test_the_qformer_of_stage_1_writes_captions():
    """Its decoding looked for the queries and the norm where they were not, and stopped with an AttributeError."""
    words = train_tokenizer(TEXTS, "bert")
    texts = write_captions(stage1(words), words, pictures(3), GenerationSettings(max_new_tokens=5, num_beams=2))
    assert len(texts) == 3 and all(isinstance(one[0].text, str) for one in texts)
    assert len({text.score for (text,) in texts}) == 3  # each is of its own image


# --- where weights come from ---


def loader(cfg, whole: Path | None = None) -> ModelLoader:
    weights = Weights(cfg.model, cfg.paths, None if whole is None else str(whole))
    return ModelLoader(weights, texts=lambda: TEXTS, say=lambda text: None)


def test_a_frozen_language_model_is_never_random(tmp_path):
    """FlanT5 was built from its config alone: stage 2 trained towards random weights, and nothing said so."""
    cfg = tiny("t5", "model.vision.frozen=false")
    with pytest.raises(UserError, match=r"model\.language\.frozen=true, but nothing says where its weights come from"):
        loader(cfg).stage2(new_projection=True)
    gates = [
        layer.gelu_act for layer in stage2(train_tokenizer(TEXTS, "t5")).language.sublayers() if hasattr(layer, "gelu_act")
    ]
    one = paddle.ones([1])
    assert gates and all(float(gate(one)) == pytest.approx(0.8413447, abs=1e-6) for gate in gates)  # tanh's is 0.8411920


def test_each_part_gets_its_own_weights(tmp_path):
    """Merging read the image encoder's file again in the place of the Q-Former's, which stayed as it was."""
    cfg, words = tiny("opt"), train_tokenizer(TEXTS, "bert")
    model = stage1(words)
    encoder = save_checkpoint(tmp_path / "vision", nn.LayerDict({"vision": model.vision}), kind="vision", step=1)
    freeze(model.vision)
    origin = {"vision": str(encoder)}
    bridge = save_checkpoint(
        tmp_path / "stage1", model, kind="stage1", step=1, tokenizers={"qformer": words}, frozen_origin=origin
    )
    merged, _ = loader(cfg, bridge).stage1()
    state = merged.state_dict()
    assert any(name.startswith("vision.") for name in state) and any(name.startswith("qformer.") for name in state)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.numpy(), err_msg=name)


def test_a_tensor_of_another_shape_is_never_skipped(tmp_path):
    """Tensor parallelism loaded whole matrices into halves; those that did not fit were left out without a word."""

    def parts(width: int) -> nn.Layer:
        return nn.LayerDict({"vision": nn.Linear(4, 4), "language_proj": nn.Linear(4, width)})

    folder = save_checkpoint(tmp_path / "checkpoint", parts(4), kind="k", step=1)
    half = parts(2)
    before = half["vision"].weight.numpy().copy()
    with pytest.raises(UserError, match=r"language_proj\.(weight|bias) is \[.*4\] in the file, but \[.*2\] in the model"):
        load_checkpoint(folder, half)
    np.testing.assert_array_equal(half["vision"].weight.numpy(), before)


def test_the_qformer_starts_from_bert_and_its_queries_from_the_texts_feed_forward(tmp_path):
    """Stage 1 "from scratch" left the Q-Former random."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    layer = {"attention.output.dense": (4, 4), "intermediate.dense": (6, 4), "output.dense": (4, 6)}
    layer |= {f"attention.self.{name}": (4, 4) for name in ("query", "key", "value")}
    tensors = {
        f"bert.encoder.layer.0.{name}.{kind}": random(*(shape if kind == "weight" else shape[:1]))
        for name, shape in layer.items()
        for kind in ("weight", "bias")
    }
    norms = ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"]
    tensors |= {f"bert.{name}.LayerNorm.{kind}": random(4) for name in norms for kind in ("weight", "bias")}
    tensors |= {
        "bert.embeddings.word_embeddings.weight": random(9, 4),
        "bert.embeddings.position_embeddings.weight": random(5, 4),
    }
    save_file(tensors, str(tmp_path / "model.safetensors"))
    found = open_source(tmp_path).tensors
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "norm.weight"):
        text, query = found[f"qformer.layers.0.text_ffn.{name}"].read(), found[f"qformer.layers.0.query_ffn.{name}"].read()
        np.testing.assert_array_equal(text, query)
    np.testing.assert_array_equal(
        found["qformer.layers.0.query_ffn.fc1.weight"].read(), tensors["bert.encoder.layer.0.intermediate.dense.weight"].T
    )


# --- data and scores ---


def write(path: Path, entries: list[dict]) -> str:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A picture that is all red under the name that another folder has for a blue one."""
    for name, colour in (("coco", "red"), ("vg", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "1.png")
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "2.png")
    return tmp_path


@pytest.fixture
def custom(folder) -> CustomConfig:
    transform = TransformConfig(mean=[0.5] * 3, std=[0.5] * 3, crop_scale=None, flip=False)
    rows = [
        {"image": f"{n}.png", "image_id": 20 + n, "question": f"what is {n}?", "answer": ["red"] * 10, "question_id": 10 + n}
        for n in (1, 2)
    ]
    return CustomConfig(
        name="custom",
        transform=transform,
        on_bad_image=OnBadImage.stop,
        num_workers=0,
        max_pixels=100,
        eval_limit=None,
        images=str(folder / "coco"),
        train_captions=write(folder / "train.json", [{"image": "1.png", "image_id": 1, "caption": "a red square"}]),
        val_captions=None,
        eval_captions=write(
            folder / "eval.json", [{"image": "2.png", "image_id": 2, "caption": ["the last one", "number two"]}]
        ),
        eval_questions=write(folder / "questions.json", [*rows, {**rows[0], "question": "why?", "question_id": 13}]),
        train_questions=None,
        val_questions=None,
        annotation_cache=str(folder / "cache"),
    )


def test_captions_are_scored_against_those_of_their_split(custom):
    """The ground truth was the test split's whatever split was evaluated."""
    source = Custom(custom)
    truth = {split: {sample.image_id: sample.captions for sample in source.captions(split)} for split in ("train", "eval")}
    assert truth == {"train": {1: ("a red square",)}, "eval": {2: ("the last one", "number two")}}
    with pytest.raises(UserError, match=r"1 of 1 images were not captioned, e\.g\. image 2"):
        caption_scores({1: "a red square"}, truth["eval"], ["BLEU"])


def test_no_folder_of_one_machine_is_written_into_the_program():
    """Ground truth was looked for below /root, other files below a developer's home."""
    root = Path(__file__).parents[1]
    files = [
        path for part in ("blip2x", "conf", "runners") for path in (root / part).rglob("*") if path.suffix in (".py", ".yaml")
    ]
    assert len(files) > 100
    named = re.compile(r"""["'\s:=](/(root|home|export|mnt|data|Users)/|~/)""")
    assert not [
        f"{path}: {line}" for path in files for line in path.read_text(encoding="utf-8").splitlines() if named.search(line)
    ]
    paths = compose_config(["task=caption", "paths.outputs=/elsewhere/runs", "paths.weights=/elsewhere/weights"]).paths
    assert (paths.outputs, paths.weights) == ("/elsewhere/runs", "/elsewhere/weights")


class Ranks(Context):
    """Rank 0 of two; the other one has `theirs`."""

    def __init__(self, theirs: list[tuple[int, str]]):
        super().__init__(world_size=2)
        object.__setattr__(self, "theirs", theirs)

    def gather_objects(self, value):
        return [value, self.theirs]


def test_results_of_all_ranks_come_together_each_once():
    """Rank 0 merged files before the others had written theirs, and took those of an earlier run for new ones."""
    ours, theirs, all_four = [(0, "a"), (3, "d")], [(2, "c"), (1, "b")], np.arange(4)
    assert gather_rows(Ranks(theirs), ours, all_four) == ["a", "b", "c", "d"]
    with pytest.raises(RuntimeError, match="4 results came from all ranks, not 4; 2 of them for a sample that had one"):
        gather_rows(Ranks(ours), ours, all_four)
    with pytest.raises(RuntimeError, match="3 results came from all ranks, not 4"):
        gather_rows(Ranks(theirs[1:]), ours, all_four)


def test_questions_find_their_images(custom):
    """Questions were read by a key that no file has, and from a folder whose name was mistyped."""
    questions = Custom(custom).questions("eval")
    assert [(q.question_id, q.image_id) for q in questions] == [(11, 21), (12, 22), (13, 21)]
    assert all(question.image.open().size == (8, 8) for question in questions)


def test_several_data_sets_are_trained_on_together_each_with_its_own_images(custom, folder):
    """COCO and Visual Genome could not be joined, and the second one's images were looked for in the first one's folder."""
    shared = {field.name: getattr(custom, field.name) for field in fields(DatasetConfig) if field.name != "kind"}
    splits = {"train": AnnotationFiles(captions=custom.train_captions)}
    parts = {name: ImageTextPart(images=str(folder / name), splits=splits) for name in ("coco", "vg")}
    own = {"parts": parts, "train_split": "train", "val_split": None, "eval_split": "test"}
    samples = ImageText(ImageTextConfig(**shared, **own, annotation_cache=custom.annotation_cache)).captions("train")
    assert [sample.image.open().getpixel((0, 0)) for sample in samples] == [(255, 0, 0), (0, 0, 255)]
    assert len({sample.image_id for sample in samples}) == 2


# --- what it runs on, and what it is asked for ---


def stage1_loss(count: int) -> dict[str, paddle.Tensor]:
    words = train_tokenizer(TEXTS, "bert")
    cfg = compose_config(["task=pretrain_stage1", *FAMILIES["opt"], "task.contrast_steps=0", "task.label_smoothing=0"])
    ids_BL, mask_BL = words.encode(TEXTS[:count], max_length=8)
    batch = {"image_id_B": np.arange(count), "text_ids_BL": ids_BL, "text_mask_BL": mask_BL}
    objective = Stage1Objective(stage1(words), Context(), cfg.task, dec_id=words.dec_id)
    parts = objective({"image_BCHW": pictures(count), **to_tensors(batch)})
    parts["loss"].backward()
    return parts


def test_training_needs_no_gpu():
    """An assertion on the name of the device stopped everything that was no GPU."""
    before = paddle.get_device()
    try:
        context = STRATEGIES.get("single")(compose_config(["parallelism=single"]).parallelism, Device.cpu)
        parts = stage1_loss(2)
    finally:
        paddle.set_device(before)
    assert context.device == "cpu" and parts["loss"].place.is_cpu_place() and np.isfinite(float(parts["loss"]))


def test_a_batch_of_one_pair_keeps_its_axes():
    """A bare squeeze took the axis of a single pair away with the others."""
    one = paddle.ones([1, 3, 4])
    assert [list(scores.shape) for scores in similarities(one, one[:, 0], one, one[:, 0], paddle.ones([1]))] == [[1, 1], [1, 1]]
    parts = stage1_loss(1)
    assert float(parts["itc"]) == pytest.approx(0, abs=1e-6)  # nothing to be mistaken for
    assert np.isfinite(float(parts["loss"])) and float(parts["lm"]) > 0


def test_the_language_model_is_the_one_asked_for_whatever_its_folder_is_called():
    """It was chosen by letters in a path ("opt" is in "options"), and its embeddings were looked for in another model."""
    for kind, other in (("opt", "t5"), ("t5", "opt")):
        language = tiny(kind, f"model.language.weights=/adopted/{other}-options").model.language
        model = LANGUAGE_MODELS.get(language.kind)(language, 11)
        assert model.is_encoder_decoder == (kind == "t5")
        assert list(model.embed(paddle.to_tensor([[1, 2, 3]])).shape) == [1, 3, 16]
    with pytest.raises(UserError, match=r"unknown language model 'llama'; known: opt, t5"):
        LANGUAGE_MODELS.get("llama")
