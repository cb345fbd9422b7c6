"""Every rank's share of a model, put together with the others', computes what the whole model computes.

The ranks are threads here, and a stand-in for paddle.distributed lets them meet; tests/distributed has real processes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.freeze import freeze
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.tensor_parallel import Share, check_split, share_of
from blip2x.models.vision.clip_vit import ClipVit
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.models.weights.checkpoint import fill, stored_parameter
from blip2x.parallel import collectives
from blip2x.parallel.context import TensorGroup

# Of an array's largest number. Float32 sums in another order differ by 1e-7 of it; T5's attention scores, which are not scaled,
# make 5e-6 of that in the gradient. A bias that every rank adds, or a part that is missing, is felt above 1e-2.
TOLERANCE = 2e-5

OPT = {"width": 16, "depth": 2, "num_heads": 4, "mlp_width": 24, "vocab_size": 11, "max_positions": 16, "dropout": 0.5}
T5 = {"width": 16, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4, "head_width": 6, "mlp_width": 24, "vocab_size": 11}
T5 |= {"relative_buckets": 8, "relative_max_distance": 16, "exact_gelu": True, "dropout": 0.5}
VIT = {"image_size": 12, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 4, "mlp_width": 24, "drop_path_rate": 0.1}
VIT |= {"recompute": False}
MODELS = {
    "opt": lambda: OptLanguageModel(**OPT),
    "t5": lambda: T5LanguageModel(**T5),
    "eva": lambda: EvaVit(**VIT),
    "eva_with_key_bias": lambda: EvaVit(**VIT, key_bias=True),
    "clip": lambda: ClipVit(**VIT),
}
SIZES = (2, 4)  # 11 words: 6 and 5, or three times 3 and 2


class Threads:
    """Takes paddle.distributed's place: `group` is the rank of the thread that calls."""

    def __init__(self, size: int):
        self.meeting, self.brought = threading.Barrier(size, timeout=30), [None] * size

    def all_reduce(self, tensor, group):
        tensor.set_value(np.sum(self._exchange(tensor, group), axis=0))

    def all_gather(self, parts, tensor, group):
        parts.extend(map(paddle.to_tensor, self._exchange(tensor, group)))

    def _exchange(self, tensor, rank):
        self.brought[rank] = tensor.numpy().copy()
        self.meeting.wait()
        found = list(self.brought)
        self.meeting.wait()  # nobody brings the next one before all have looked
        return found


@pytest.fixture
def together(monkeypatch):
    """`together(models, work)` -> `work(model)` of each rank's model, all at once."""

    def run(models, work):
        threads = Threads(len(models))
        monkeypatch.setattr(collectives, "dist", threads)

        def guarded(model):
            try:
                return work(model)
            except BaseException:
                threads.meeting.abort()  # the others would wait for this one
                raise

        with ThreadPoolExecutor(len(models)) as pool:
            futures = [pool.submit(guarded, model) for model in models]
        broken = [future for future in futures if future.exception()]
        cause = [future for future in broken if not isinstance(future.exception(), threading.BrokenBarrierError)]
        return [future.result() for future in cause or broken or futures]

    return run


@pytest.fixture(scope="module")
def whole(enliven):
    """`whole(kind)`, frozen."""
    models = {}
    for kind, build in MODELS.items():
        paddle.seed(7)
        models[kind] = enliven(build())
        freeze(models[kind])
    return models.__getitem__


@pytest.fixture(scope="module")
def split(whole):
    """`split(kind, size)`: the ranks' models, filled from the whole one's tensors."""

    def build(kind, size):
        tensors = {name: stored_parameter(name, parameter) for name, parameter in whole(kind).named_parameters()}
        models = []
        for rank in range(size):
            with paddle.LazyGuard():
                model = MODELS[kind]()
            model.split_over(TensorGroup(rank, size, group=rank))
            fill(model, tensors, "file")
            freeze(model)
            models.append(model)
        return models

    return build


def texts(rows: int, length: int, width: int = 16) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Embeddings, and a mask with padding in the last row."""
    embeds = paddle.to_tensor(np.random.default_rng(0).normal(size=(rows, length, width)).astype("f4"))
    mask = np.ones((rows, length), "i8")
    mask[-1, : length // 2] = 0
    return embeds, paddle.to_tensor(mask)


def read(model: nn.Layer, place: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits, of all positions or at `place`, and the gradient of a loss of them that comes back to the embeddings."""
    embeds, mask = texts(2, 6)
    embeds.stop_gradient = False
    words = (paddle.to_tensor([[0, 7, 10, 2], [0, 1, 9, 5]]), paddle.ones([2, 4], "int64")) if model.is_encoder_decoder else ()
    logits = model(embeds, mask, *words, None if place is None else paddle.to_tensor(place))
    (logits.tanh() * paddle.arange(11.0)).sum().backward()
    return logits.numpy(), embeds.grad.numpy()


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("place", [None, (1, 2, 7)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_logits_and_gradients_of_a_split_reader(whole, split, together, kind, size, place):
    expected = read(whole(kind), place)
    assert min(np.abs(array).max() for array in expected) > 1
    for found in together(split(kind, size), lambda model: read(model, place)):
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_logits_at_places_are_those_of_all_positions(whole, kind):
    model, place = whole(kind), (1, 2, 7)
    logits, _ = read(model)
    np.testing.assert_allclose(read(model, place)[0], logits.reshape(-1, 11)[list(place)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_decoding_of_a_split_reader(whole, split, together, kind):
    """Greedy and beam search on every rank; the caches hold the rank's heads only."""

    def decode(model):
        found = []
        for beams in (1, 3):
            settings = GenerationSettings(max_new_tokens=5, min_new_tokens=3, num_beams=beams)
            found.append(generate(model, texts(2, 6), settings, eos_id=2, pad_id=1))
        _, state = model.prefill(texts(2, 6))
        return [*(out.ids for out in found), *(out.scores for out in found)], (state if kind == "opt" else state.own).heads

    expected, heads = decode(whole(kind))
    assert expected[0].shape[1] == 5 and len(set(expected[0].ravel())) > 2
    for found, own_heads in together(split(kind, 2), decode):
        assert_same(found, expected)
        assert (heads, own_heads) == (4, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["eva", "eva_with_key_bias", "clip"])
def test_features_of_a_split_encoder(whole, split, together, kind, size):
    def look(model):
        with paddle.no_grad():
            return model(paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype("f4"))).numpy()

    expected = look(whole(kind))
    for found in together(split(kind, size), look):
        assert_same([found], [expected])


@pytest.mark.parametrize("kind", MODELS)
def test_shares_are_of_the_tensors_they_say_and_what_is_whole_is_equal(whole, split, kind):
    """Nothing between norms is left whole, names are the same, and all the ranks' shares are the tensor again."""
    ranks = [dict(model.named_parameters()) for model in split(kind, 2)]
    for name, tensor in whole(kind).named_parameters():
        shares = [share_of(rank[name]) for rank in ranks]
        if shares[0] is None:
            stays = ("norm", "positions", "position_embeddings", "class_token", "projection", "out", "fc2", "linear2")
            assert any(part in name for part in stays) and (tensor.ndim == 1 or "pos" in name or "embeddings" in name), name
            for rank in ranks:
                np.testing.assert_array_equal(rank[name].numpy(), tensor.numpy())
            continue
        assert all(rank[name].stop_gradient for rank in ranks)
        again = np.full(tensor.shape, np.nan, "f4")
        for rank, share in zip(ranks, shares, strict=True):
            for piece, place in share.pieces():
                again[piece] = rank[name].numpy()[place]
        np.testing.assert_array_equal(again, tensor.numpy(), err_msg=name)
    assert len(ranks[0]) == len(list(whole(kind).named_parameters()))


def test_a_share_of_three_blocks_and_one_that_ends_in_padding():
    packed = Share((2, 12), axis=1, rank=1, size=2, blocks=3)
    assert packed.shape == (2, 6) and not packed.is_padded
    columns = [(piece[1].start, piece[1].stop, place[1].start, place[1].stop) for piece, place in packed.pieces()]
    assert columns == [(2, 4, 0, 2), (6, 8, 2, 4), (10, 12, 4, 6)]
    rows = [Share((5, 3), axis=0, rank=rank, size=4) for rank in range(4)]  # two each, so that the last has none
    assert all(share.shape == (2, 3) and share.is_padded for share in rows)
    assert [(piece[0].start, piece[0].stop) for share in rows for piece, _ in share.pieces()] == [
        (0, 2),
        (2, 4),
        (4, 5),
        (5, 5),
    ]


def test_a_share_is_not_saved_as_if_it_were_the_whole(split):
    model = split("eva", 2)[0]
    with pytest.raises(ValueError, match=r"^fc1 is split over 2 ranks and cannot be saved by one$"):
        stored_parameter("fc1", model.blocks[0].fc1.weight)


@pytest.mark.parametrize(
    ("words", "part", "size", "sentence"),
    [
        ([], "language", 3, r"^model\.language\.num_heads=4 cannot be shared evenly by parallelism\.tp=3 ranks"),
        (["model.vision.mlp_width=190"], "vision", 4, r"^model\.vision\.mlp_width=190 cannot .* parallelism\.tp=4 ranks"),
        (["model.language.frozen=false"], "language", 2, r"^parallelism\.tp=2 .* model\.language\.frozen=false .*tp=1$"),
        (["model.vision.frozen=false"], "vision", 2, r"model\.vision\.frozen=false .* set parallelism\.tp_vision=false$"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(words, part, size, sentence):
    cfg = compose_config(words).model
    with pytest.raises(UserError, match=sentence):
        check_split(cfg, part, size)
    check_split(compose_config([]).model, part, 2)
