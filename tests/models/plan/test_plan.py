"""Plans beside built models and predicted memory, and that they say what anybody would who works them out by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.memory import predict as memory
from blip2x.models.plan.assumptions import MACHINES, MEMORY_USED, Machine
from blip2x.models.plan.choose import layouts, recommend
from blip2x.models.plan.estimate import Training, estimate, fits, picture_seconds, speed, wire
from blip2x.models.plan.page import BLOCKS, renewed
from blip2x.models.plan.parameters import parameters
from blip2x.models.plan.table import hours, name, options
from blip2x.models.plan.traffic import SEGMENT, Layout, Traffic
from blip2x.parallel import sharding
from blip2x.parallel.degrees import Degrees
from blip2x.tasks.checkup.memory import Texts, prediction_of

PAGE = Path(__file__).resolve().parents[3] / "docs/scaling.md"
WORDS = {"qformer": 61, "language": 67}
A100, H100 = MACHINES["a100_40gb"], MACHINES["h100_80gb"]
BUILDERS = {
    "pretrain_stage1": lambda cfg: build_stage1(cfg, vocab_size=61),
    "pretrain_stage2": lambda cfg: build_stage2(cfg, vocab_size=67),
    "vqa_finetune": lambda cfg: build_stage2(cfg, vocab_size=67, question_vocab_size=61),
}


@pytest.fixture(scope="module")
def configs():
    """`configs(*words)`, each composed once."""
    known = {}

    def config(*words: str):
        if words not in known:
            known[words] = compose_config(list(words))
        return known[words]

    return config


@pytest.fixture(scope="module")
def reader(configs):
    """Stage 2 with OPT-2.7B, by the paper's numbers."""
    cfg = configs("task=pretrain_stage2", "model=opt2.7b", "dataset=coco")
    return Training(cfg.model, cfg.task, 1920, 32, steps=80_000)


@pytest.fixture(scope="module")
def pairs(reader, configs):
    """Stage 1, by the paper's numbers."""
    task = configs("task=pretrain_stage1", "dataset=coco").task
    return Training(reader.cfg, task, 1680, 32, steps=250_000)


def built(model: nn.Layer) -> Counter:
    """(part, numbers, whether it is a matrix that stage 3 may cut) -> how many."""
    matrices = {
        id(layer.weight)
        for key, layer in model.named_sublayers()
        if isinstance(layer, nn.Linear) and key.rpartition(".")[2] not in sharding.READ_BY_PARENT
    }
    found: Counter = Counter()
    for key, parameter in model.named_parameters():
        first = key.split(".")[0]
        part = first if first in ("vision", "language") else "qformer"
        found[part, math.prod(parameter.shape), id(parameter) in matrices] += 1
    return found


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("words", [(), ("model=tiny_t5",), ("model/vision=clip_vit_l",)])
def test_parameters_are_the_models(configs, kind, words):
    cfg = configs(*words).model
    with paddle.LazyGuard():
        model = BUILDERS[kind](cfg)
    assert Counter((one.part, one.numbers, one.linear) for one in parameters(cfg, kind, WORDS)) == built(model)
    assert SEGMENT == sharding.SEGMENT_SIZE


LAYOUTS = {
    "dp": (2, 1, 0, 1),
    "sharding1": (1, 2, 1, 1),
    "sharding2": (2, 2, 2, 1),
    "sharding3": (1, 2, 3, 1),
    "tp2": (2, 1, 0, 2),
}


STAGE1, STAGE2, ANSWERS = ("task=pretrain_stage1",), ("task=pretrain_stage2",), ("task=vqa_finetune", "model=tiny_t5")
PAIRS = [(words, layout) for words in (STAGE1, STAGE2, ANSWERS) for layout in LAYOUTS if (words, layout) != (STAGE1, "tp2")]


@pytest.mark.parametrize(("words", "layout"), PAIRS)
def test_memory_is_that_of_the_prediction(configs, layout, words):
    dp, sharing, stage, tp = LAYOUTS[layout]
    cfg = replace(configs(*words, "precision=bf16"))
    cfg.task.batch_size = 8
    own = Layout(Degrees(dp, sharing, tp), stage)
    other = memory.Layout(own.degrees, stage)
    found, _ = prediction_of(cfg, other, Texts(9, 7, WORDS, 5))
    training = Training(cfg.model, cfg.task, 8 * own.data_ranks, 9, 7, 5, WORDS)
    batch = training.batch(own, 1)
    assert batch.rows == 8
    assert training.activations(own, batch) == pytest.approx(found.activations, rel=0.001)
    # norms and positions of frozen towers are stored in float32, and whole on every rank; a tiny model has many of them
    assert training.kept(own) == pytest.approx(found.kept, rel=0.05)


def test_rings_and_links():
    """By hand: 8 GPUs of a node hand 80 MB to a sum, 16 of two nodes gather 10 MB each."""
    link = replace(A100, inside=100e9, outside=10e9, node=8)
    one_node, two_nodes = Layout(Degrees(8, 1)), Layout(Degrees(16, 1))
    size, seconds = wire(Traffic("", "all_reduce", "all", 80_000_000), link, one_node)
    assert size == pytest.approx(2 * 7 / 8 * 80e6)
    assert seconds == pytest.approx(140e6 / 80e9 + 3 * 20e-6)  # 80 % of the link's speed, and 20 µs for each doubling
    size, seconds = wire(Traffic("", "all_gather", "data", 10_000_000), link, two_nodes)
    assert size == pytest.approx(150e6)
    assert seconds == pytest.approx(150e6 / (0.8 * 80e9) + 4 * 20e-6)  # 8 cards of 10 GB/s
    sharing = Layout(Degrees(1, 8), 2)  # all bytes of a call pass each link, whoever is the one that they go to or come from
    for operation in ("reduce", "broadcast"):
        size, seconds = wire(Traffic("", operation, "sharding", 80_000_000, 4), link, sharing)
        assert size == 80e6 and seconds == pytest.approx(80e6 / 80e9 + 4 * 3 * 20e-6)
    alone = Layout(Degrees(2, 1, 8))  # a node is one data rank: each of its GPUs has a ring, and a card, of its own
    assert speed("data", link, alone) == pytest.approx(0.8 * 10e9)
    assert speed("tensor", link, alone) == pytest.approx(0.8 * 100e9)


def test_time_follows_from_operations(reader):
    """Ten times the utilisation takes a tenth of the time; half of the rows take half of it."""
    link = replace(A100, overhead=0.0, memory_speed=1e18, utilisation=dict.fromkeys(("vision", "qformer", "language"), 0.04))
    quick = replace(link, utilisation=dict.fromkeys(link.utilisation, 0.4))
    single = Layout(Degrees(1, 1))
    slow = estimate(reader, link, single, 1, memory=False)
    assert slow.step == pytest.approx(10 * estimate(reader, quick, single, 1, memory=False).step)
    assert slow.peak_share == pytest.approx(0.04)
    assert estimate(reader, link, Layout(Degrees(2, 1)), 1, memory=False).forward == pytest.approx(slow.forward / 2)


def test_reading_weights_bounds_the_time_of_few_rows(reader):
    few = replace(reader, samples=1)
    step = estimate(few, replace(A100, peak=1e30), Layout(Degrees(1, 1)), 1, memory=False)
    frozen = 2 * (2_651_596_800 + 985_894_528)  # bytes of both towers
    assert step.forward == pytest.approx((frozen + 4 * 107_133_696) / (0.8 * A100.memory_speed), rel=0.01)


def test_the_papers_machine_takes_less_than_its_days(reader, pairs):
    """16 A100 of 40 GB in data parallelism, as there, whose days are bounds; but not ten times less."""
    for training, days in ((pairs, 6), (reader, 3)):
        found = recommend(training, A100, 16)
        assert name(found.layout) == "dp"
        assert days / 5 < hours(training, found) / 24 < days
        assert found.memory < MEMORY_USED * A100.memory


def test_what_does_not_fit_is_divided(reader):
    """A GPU with room for half of the reader needs tensor parallelism; one with none for the image encoder can do nothing."""
    small = replace(A100, memory=9 * 2**30)
    single, two = (Layout(Degrees(1, 1, tp)) for tp in (1, 2))
    assert not fits(estimate(replace(reader, samples=1), small, single, 1), small)
    found = recommend(replace(reader, samples=16), small, 2)
    assert found.layout == two
    assert options(found.layout) == "parallelism=tp2"
    assert recommend(replace(reader, samples=16), replace(A100, memory=2**30), 8) is None


def test_trained_towers_are_not_split(reader, configs):
    cfg = replace(reader.cfg, language=replace(reader.cfg.language, frozen=False))
    assert all(layout.degrees.tp == 1 for layout in layouts(replace(reader, cfg=cfg), A100, 8))
    assert {layout.degrees.tp for layout in layouts(reader, A100, 8)} == {1, 2, 4, 8}


def test_micro_batches_keep_all_negatives(pairs):
    """Where the pairs of a step do not fit at once, contrast is cached, and its features cost time twice."""
    found = recommend(pairs, A100, 8)
    assert found.batch.accumulate == 2
    assert [pairs.task_for(count).cached_contrast for count in (1, 2)] == [False, True]  # whatever the command says
    assert replace(pairs, task=replace(pairs.task, accumulate=2, cached_contrast=True)).task_for(1) == pairs.task_for(1)
    once, twice = (pairs.operations(found.layout, pairs.batch(found.layout, count))["qformer"] for count in (1, 2))
    assert twice[0] > 1.1 * once[0]
    assert twice[1] == pytest.approx(once[1], rel=0.01)
    needed = [pairs.needed(found.layout, pairs.batch(found.layout, count)) for count in (1, 2)]
    assert needed[1] == pytest.approx(needed[0], rel=0.01)


@pytest.mark.parametrize(("itm_weight", "ahead", "back"), [(1.0, 3, 2), (0.0, 2, 1)])
def test_cached_contrast_goes_through_a_trained_image_encoder_again(pairs, itm_weight, ahead, back):
    """It looks ahead at each picture, and sees that of each text's negative once more."""
    vision = replace(pairs.cfg.vision, frozen=False, recompute=True)
    tuned = replace(pairs, cfg=replace(pairs.cfg, vision=vision), task=replace(pairs.task, itm_weight=itm_weight))
    layout = Layout(Degrees(8, 1))
    once, cached = (tuned.operations(layout, tuned.batch(layout, count))["vision"] for count in (1, 2))
    assert cached == pytest.approx((ahead * once[0], back * once[1]), rel=0.01)
    frozen = [pairs.operations(layout, pairs.batch(layout, count))["vision"] for count in (1, 2)]
    assert frozen[1] == pytest.approx(frozen[0], rel=0.01)


def test_sharding_3_gathers_for_the_look_ahead_of_cached_contrast_too(pairs):
    layout = Layout(Degrees(1, 8), 3)
    once, cached = (
        sum(one.bytes for one in pairs.traffic(layout, pairs.batch(layout, count)) if one.name == "weights") / count
        for count in (1, 2)
    )
    assert cached / once == pytest.approx(9 / 8)  # text, own pairs, others, caption, there and back


def test_what_is_done_twice_is_not_needed(reader):
    """Tensor ranks repeat the image encoder and the Q-Former, and recomputation a way there: both cost time and no more."""
    dp, tp = Layout(Degrees(4, 1)), Layout(Degrees(2, 1, 2))
    same = [reader.needed(layout, reader.batch(layout, 1)) for layout in (dp, tp)]
    assert same[0] == pytest.approx(same[1], rel=0.001)
    plain, split = (estimate(reader, A100, layout, 1, memory=False) for layout in (dp, tp))
    assert split.peak_share / plain.peak_share == pytest.approx(plain.step / split.step, rel=0.001)
    again = replace(reader, cfg=replace(reader.cfg, qformer=replace(reader.cfg.qformer, recompute=True)))
    assert again.needed(dp, again.batch(dp, 1)) == same[0]
    assert again.operations(dp, again.batch(dp, 1))["qformer"][1] == pytest.approx(
        1.5 * reader.operations(dp, reader.batch(dp, 1))["qformer"][1]
    )


def test_sums_hide_only_behind_the_last_way_back_of_what_is_trained(reader):
    """On a slow link, by hand; a frozen reader's way back, which comes first, hides nothing."""
    slow, layout = replace(A100, outside=0.1e9, node=1, memory_speed=1e18), Layout(Degrees(4, 1))
    for accumulate in (1, 4):
        batch = reader.batch(layout, accumulate)
        seconds = {one.hidden: wire(one, slow, layout)[1] for one in reader.traffic(layout, batch)}
        back = reader.operations(layout, batch)["qformer"][1] / (slow.peak * slow.utilisation["qformer"])
        found = estimate(reader, slow, layout, accumulate, memory=False)
        assert found.sending == pytest.approx(seconds[False] + seconds[True] - back / accumulate / 2)


def test_kept_features_take_no_image_encoder_and_no_pictures(reader):
    layout = Layout(Degrees(4, 1))
    kept, plain = (estimate(one, A100, layout, 1, memory=False) for one in (replace(reader, keeps_features=True), reader))
    encoder = reader.operations(layout, reader.batch(layout, 1))["vision"][0] / (A100.peak * A100.utilisation["vision"])
    assert plain.forward - kept.forward == pytest.approx(encoder)
    assert kept.cores == 0 < plain.cores
    assert all(one.degrees.tp == 1 for one in layouts(replace(reader, keeps_features=True), A100, 8))


def test_pictures_cost_more_the_larger_they_are(reader):
    large = replace(reader, cfg=replace(reader.cfg, vision=replace(reader.cfg.vision, image_size=490)))
    assert picture_seconds(large) > picture_seconds(reader)


@pytest.mark.parametrize("degrees", [(1, 1, 1, 0), (4, 8, 1, 3), (4, 1, 2, 0), (2, 4, 2, 1)])
def test_the_options_of_a_layout_give_that_layout(degrees):
    dp, sharing, tp, stage = degrees
    layout = Layout(Degrees(dp, sharing, tp), stage)
    cfg = compose_config(options(layout).split())
    assert memory.Layout.of(cfg, layout.ranks) == memory.Layout(layout.degrees, stage)


def test_the_page_is_not_behind():
    """Tables that take no time; the slow test has all of them."""
    text = PAGE.read_text(encoding="utf-8")
    said = "run: python -m blip2x.models.plan.page docs/scaling.md"
    assert renewed(text, ["assumed", "traffic of stage 1"]) == text, said


@pytest.mark.slow
def test_no_table_of_the_page_is_behind():
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, "run: python -m blip2x.models.plan.page docs/scaling.md"


def test_every_table_has_a_place_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for block in BLOCKS:
        assert text.count(f"<!-- begin {block} -->") == text.count(f"<!-- end {block} -->") == 1
    with pytest.raises(ValueError, match="begin assumed"):
        renewed("nothing")


def test_machines_are_what_their_makers_say():
    assert all(isinstance(one, Machine) and one.source for one in MACHINES.values())
    assert H100.peak / A100.peak == pytest.approx(989 / 312)
