"""Filling models: names, shapes and kinds of numbers are strict, nothing is set unless they fit, and memory is there once."""

from __future__ import annotations

import shutil
import threading
import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import save_file

from blip2x.config.task import WeightsType
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.models.precision import store_compact
from blip2x.models.tensor_parallel import keep_share
from blip2x.models.weights.checkpoint import _write, fill, is_below, load_checkpoint, split_state
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.tensor_files import open_tensors
from blip2x.parallel.context import TensorGroup


class Model(nn.Layer):
    def __init__(self, width: int = 3):
        super().__init__()
        self.vision = nn.Linear(2, width)
        self.language_proj = nn.Linear(width, 2)


class Flat(nn.Layer):
    """Vectors named by their numbers."""

    def __init__(self, *sizes: int):
        super().__init__()
        for i, size in enumerate(sizes):
            self.add_parameter(str(i), self.create_parameter([size]))


def values(layer: nn.Layer) -> dict[str, np.ndarray]:
    return {name: parameter.numpy().copy() for name, parameter in layer.named_parameters()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def stored(**arrays: np.ndarray) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(f"file, tensor {name}", np.asarray(array)) for name, array in arrays.items()}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of `Model` whose vision was frozen."""
    model = Model()
    freeze(model.vision)
    return save_checkpoint(tmp_path / "checkpoint", model, kind="k", step=1, frozen_origin={"vision": "weights/eva"})


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of all of `Model`."""
    return save_checkpoint(tmp_path / "whole", Model(), kind="k", step=1)


@pytest.fixture
def linear():
    """A layer [2, 3], and tensors for it."""
    generator = np.random.default_rng(0)
    arrays = {"weight": generator.standard_normal((2, 3)).astype("f4"), "bias": generator.standard_normal(3).astype("f4")}
    return nn.Linear(2, 3), arrays


# a checkpoint of ours


def test_a_flipped_bit_is_found_and_the_tensor_named(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in the last tensor, where no number becomes impossible
    path.write_bytes(content)
    model = Model()
    before = model.language_proj.weight.numpy()
    with pytest.raises(UserError, match=r"checkpoint/model\.safetensors, tensor language_proj\.weight is damaged: its checks"):
        load_checkpoint(folder, model, allow_missing=[("vision.", "frozen")])
    np.testing.assert_array_equal(model.language_proj.weight.numpy(), before)


def test_frozen_parts_are_missing_with_their_origin(folder):
    with pytest.raises(UserError, match=r"lacks tensors of the model \(left out because .* vision from weights/eva\): vision"):
        load_checkpoint(folder, Model())
    model = Model()
    report = load_checkpoint(folder, model, allow_missing=[("vision.", "its weights come from elsewhere")])
    assert set(report.loaded) == {"language_proj.weight", "language_proj.bias"}
    assert set(report.missing) == {"vision.weight", "vision.bias"}
    assert str(report) == f"2 tensors from {folder}; 2 not in it (its weights come from elsewhere)"


def test_names_are_strict_in_both_directions(whole):
    class More(Model):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(1, 1)

    part = nn.Sequential(("language_proj", nn.Linear(3, 2)))
    for layer, sentence in (
        (More(), r"lacks tensors of the model: extra\.bias, extra\.weight$"),
        (part, r"has tensors that the model lacks: vision\.bias, vision\.weight$"),
    ):
        before = values(layer)
        with pytest.raises(UserError, match=sentence):
            load_checkpoint(whole, layer)
        assert_same(values(layer), before)
    report = load_checkpoint(whole, part, drop=[("vision.", "not needed")])
    assert report.dropped == dict.fromkeys(["vision.weight", "vision.bias"], "not needed")


def test_a_part_is_filled_from_a_whole(whole):
    part = nn.Linear(2, 3)
    report = load_checkpoint(whole, part, prefix="vision.", drop=[("language_proj.", "another part")])
    assert set(report.loaded) == {"weight", "bias"}
    model = Model()
    load_checkpoint(whole, model)
    np.testing.assert_array_equal(part.weight.numpy(), model.vision.weight.numpy())


def test_many_names_are_cut_short(tmp_path):
    layers = nn.Sequential(*((f"vision{i}", nn.Linear(1, 1)) for i in range(4)))
    folder = save_checkpoint(tmp_path / "c", nn.LayerDict({"vision": layers}), kind="k", step=1)
    with pytest.raises(UserError, match=r"vision0\.bias, \S+vision0\.weight, .* \S+vision2\.bias and 3 more$"):
        load_checkpoint(folder, nn.Layer())


def test_numbers_stay_when_the_file_goes(whole):
    model = Model()
    load_checkpoint(whole, model)
    before = values(model)
    (whole / "model.safetensors").write_bytes(b"\xff" * (whole / "model.safetensors").stat().st_size)
    shutil.rmtree(whole)
    assert_same(values(model), before)


# shapes


def test_shapes_are_strict_and_nothing_is_set(whole):
    model = Model(width=4)
    before = values(model)
    with pytest.raises(UserError, match=r"vision\.weight is \[2, 3\] in the file, but \[2, 4\] in the model"):
        load_checkpoint(whole, model)
    assert_same(values(model), before)


def test_a_shape_that_differs_in_the_last_tensor_sets_nothing(linear):
    layer, arrays = linear
    before = values(layer)
    with pytest.raises(UserError, match=r"^file, tensor bias: bias is \[4\] in the file, but \[3\] in the model$"):
        fill(layer, stored(**{**arrays, "bias": np.zeros(4, "f4")}), "file")
    assert_same(values(layer), before)


def test_a_tensor_may_be_adapted_to_another_shape(whole):
    model, reference = Model(width=4), Model()
    adapt = dict.fromkeys(values(model), lambda array, wanted: np.resize(array, wanted))
    report = load_checkpoint(whole, model, adapt=adapt)
    assert report.adapted["vision.weight"] == "[2, 3] to [2, 4]" and "adapted ([2, 3] to [2, 4])" in str(report)
    report = load_checkpoint(whole, reference, adapt=adapt)  # of the right shape already
    assert not report.adapted
    np.testing.assert_array_equal(model.vision.weight.numpy(), np.resize(reference.vision.weight.numpy(), (2, 4)))


def test_a_tensor_that_cannot_be_adapted_is_refused(linear):
    layer, arrays = linear
    with pytest.raises(UserError, match=r"weight is \[5, 3\] in the file, but \[2, 3\] in the model"):
        fill(layer, stored(**{**arrays, "weight": np.zeros((5, 3), "f4")}), "file", adapt={"weight": lambda array, _: array})


@pytest.mark.parametrize("lazy", [False, True])
def test_a_matrix_that_may_grow_keeps_its_new_rows(linear, lazy):
    _, arrays = linear
    paddle.seed(0)
    if lazy:
        with paddle.LazyGuard():
            layer = nn.Linear(4, 3)
    else:
        layer = nn.Linear(4, 3)
    before = None if lazy else values(layer)["weight"]
    report = fill(layer, stored(**arrays), "file", grows=["weight"])
    after = layer.weight.numpy()
    np.testing.assert_array_equal(after[:2], arrays["weight"])
    assert report.adapted == {"weight": "2 rows are new"} and after[2:].all() and np.abs(after[2:]).max() < 2
    if before is not None:
        np.testing.assert_array_equal(after[2:], before[2:])


@pytest.mark.parametrize(("shape", "name"), [((5, 3), "weight"), ((3, 4), "weight"), ((2, 3), "bias")])
def test_only_rows_and_only_of_what_may_grow(linear, shape, name):
    """Neither fewer rows, nor another width, nor a tensor that is not named."""
    _, arrays = linear
    with pytest.raises(UserError, match=r"weight is \[\d, \d\] in the file, but \[4, 3\] in the model"):
        fill(nn.Linear(4, 3), stored(**{**arrays, "weight": np.zeros(shape, "f4")}), "file", grows=[name])


# numbers


@pytest.mark.parametrize("kind", ["f2", "f8", ml_dtypes.bfloat16])
def test_other_real_types_are_converted(linear, kind):
    layer, arrays = linear
    fill(layer, stored(**{name: array.astype(kind) for name, array in arrays.items()}), "file")
    assert_same(values(layer), {name: array.astype(kind).astype("f4") for name, array in arrays.items()})
    assert layer.weight.dtype == paddle.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_gets_the_nearest_numbers(linear, dtype):
    layer, arrays = linear
    layer.to(dtype=dtype)
    fill(layer, stored(**arrays), "file")
    assert str(layer.weight.dtype) == f"paddle.{dtype}"
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    for name, parameter in layer.named_parameters():
        np.testing.assert_array_equal(parameter.astype("float32").numpy(), arrays[name].astype(kind).astype("f4"))


def test_whole_numbers_are_no_weights_and_nothing_is_set(linear):
    layer, arrays = linear
    before = values(layer)
    with pytest.raises(UserError, match=r"^file, tensor bias: bias is int64 in the file, but float32 in the model$"):
        fill(layer, stored(**{**arrays, "bias": np.arange(3)}), "file")
    assert_same(values(layer), before)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e35])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_that_are_no_weights_are_refused_by_name(linear, name, wrong):
    layer, arrays = linear
    arrays[name].flat[1] = wrong
    with pytest.raises(UserError, match=rf"^file, tensor {name} holds numbers that are no weights"):
        fill(layer, stored(**arrays), "file")


def test_numbers_that_half_precision_cannot_hold_are_refused(linear):
    layer, arrays = linear
    layer.to(dtype="float16")
    arrays["bias"][:] = 1e6
    with pytest.raises(UserError, match="tensor bias holds numbers that are no weights"), np.errstate(over="ignore"):
        fill(layer, stored(**arrays), "file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_parameter_elsewhere_than_on_a_cpu_is_set_through_paddle(linear, dtype):
    """There is no GPU here: a parameter that says so."""
    layer, arrays = linear
    layer.to(dtype=dtype)
    before = layer.weight.astype("float32").numpy()
    elsewhere = SimpleNamespace(is_cpu_place=lambda: False)
    parameter = SimpleNamespace(
        place=elsewhere,
        dtype=layer.weight.dtype,
        shape=layer.weight.shape,
        numpy=layer.weight.numpy,
        set_value=layer.weight.set_value,
    )
    _write(parameter, arrays["weight"][:1], "file")
    found = layer.weight.astype("float32").numpy()
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    np.testing.assert_array_equal(found[0], arrays["weight"][0].astype(kind).astype("f4"))
    np.testing.assert_array_equal(found[1], before[1])
    with pytest.raises(UserError, match=r"^file holds numbers that are no weights"):
        _write(parameter, np.full((2, 3), np.nan), "file")


def test_transposed_scalar_and_empty_tensors(linear):
    _, arrays = linear
    layer = nn.Linear(3, 2)
    layer.scale = layer.create_parameter([1])
    layer.nothing = layer.create_parameter([0, 4])
    layer.register_buffer("count", paddle.zeros([], dtype="int64"))
    numbers = stored(weight=arrays["weight"].T, bias=arrays["bias"][:2], scale=[0.07], nothing=np.empty((0, 4)), count=7)
    fill(layer, numbers, "file")
    np.testing.assert_array_equal(layer.weight.numpy(), arrays["weight"].T)
    assert float(layer.scale) == pytest.approx(0.07) and int(layer.count) == 7


# memory


def test_a_model_without_memory_gets_it_once_and_draws_no_numbers(whole):
    with paddle.LazyGuard():
        lazy = Model()
    assert not any(parameter._is_initialized() for parameter in lazy.parameters())
    paddle.seed(3)
    expected = paddle.rand([2]).numpy()
    paddle.seed(3)
    load_checkpoint(whole, lazy)
    np.testing.assert_array_equal(paddle.rand([2]).numpy(), expected)  # nothing was drawn in between
    eager = Model()
    places = {name: parameter.data_ptr() for name, parameter in eager.named_parameters()}
    load_checkpoint(whole, eager)
    assert places == {name: parameter.data_ptr() for name, parameter in eager.named_parameters()}
    assert_same(values(lazy), values(eager))


def test_what_is_missing_is_initialised_as_the_layer_says(folder):
    class Constant(Model):
        def __init__(self):
            super().__init__()
            self.vision = nn.Linear(2, 3, weight_attr=nn.initializer.Constant(7.0))

    with paddle.LazyGuard():
        lazy = Constant()
    load_checkpoint(folder, lazy, allow_missing=[("vision.", "new")])
    assert (lazy.vision.weight.numpy() == 7).all() and not lazy.vision.bias.numpy().any()


def test_a_model_that_got_its_memory_here_can_be_trained_saved_and_frozen(whole, tmp_path):
    with paddle.LazyGuard():
        model = Model()
    load_checkpoint(whole, model)
    freeze(model.vision)
    before = values(model)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=[p for p in model.parameters() if not p.stop_gradient])
    model.language_proj(model.vision(paddle.ones([1, 2]))).sum().backward()
    optimizer.step()
    after = values(model)
    assert {name for name in after if (after[name] != before[name]).any()} == {"language_proj.weight", "language_proj.bias"}
    again = Model()
    save_checkpoint(tmp_path / "again", model, kind="k", step=2, frozen_origin={"vision": "x"})
    load_checkpoint(tmp_path / "again", again, allow_missing=[("vision.", "frozen")])
    np.testing.assert_array_equal(again.language_proj.weight.numpy(), after["language_proj.weight"])


def test_one_tensor_is_open_at_a_time(linear):
    layer, arrays = linear
    alive = []

    class Array(np.ndarray):
        def __del__(self):
            if self.base is None or not isinstance(self.base, Array):
                alive.remove(id(self))

    def opened(array):
        view = array.view(Array)
        alive.append(id(view))
        assert len(alive) == 1
        return view

    tensors = {
        name: StoredTensor(name, array.shape, array.dtype, lambda array=array: opened(array)) for name, array in arrays.items()
    }
    fill(layer, tensors, "file")
    assert not alive and (layer.weight.numpy() == arrays["weight"]).all()


# shares of split parameters


def rank_of(layer: nn.Layer, rank: int, size: int, axis: int = 0, **blocks: int) -> nn.Layer:
    """`layer`, of whose weight a rank keeps its share."""
    keep_share(layer, "weight", axis, TensorGroup(rank, size), **blocks)
    return layer


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_ranks_read_their_shares_of_a_mapped_file(tmp_path, kind, transposed):
    """Rows, columns, and columns of each of three blocks; of PyTorch's layout, too, which is transposed behind the mapping."""
    generator = np.random.default_rng(0)
    array = generator.standard_normal((600, 12)).astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    save_file({"weight": array.T.copy() if transposed else array, "bias": np.zeros(12, "f4")}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    if transposed:
        tensors["weight"] = tensors["weight"].changed((600, 12), lambda stored: stored.T)
    whole = array.astype("f4")
    q, k, v = np.split(whole, 3, axis=1)
    for rank, rows, columns in ((0, slice(300), slice(2)), (1, slice(300, 600), slice(2, 4))):
        for layer, expected in (
            (rank_of(nn.Linear(600, 12), rank, 2), whole[rows]),
            (rank_of(nn.Linear(600, 12), rank, 2, axis=1), whole[:, :6] if rank == 0 else whole[:, 6:]),
            (rank_of(nn.Linear(600, 12), rank, 2, axis=1, blocks=3), np.hstack([q[:, columns], k[:, columns], v[:, columns]])),
        ):
            fill(layer, tensors, "file")
            np.testing.assert_array_equal(layer.weight.numpy(), expected)


def test_padding_is_0_and_a_rank_may_have_nothing_else():
    arrays = {"weight": np.arange(1, 11, dtype="f4").reshape(5, 2)}
    for rank, first in enumerate((1, 5, 9, 11)):
        layer = rank_of(nn.Embedding(5, 2), rank, 4)
        fill(layer, stored(**arrays), "file")
        expected = np.arange(first, first + 4, dtype="f4").reshape(2, 2)
        np.testing.assert_array_equal(layer.weight.numpy(), np.where(expected > 10, 0, expected))


def test_shapes_are_compared_and_adapted_as_a_whole():
    """As words that the model lacks are cut off: what is left is split."""
    layer = rank_of(nn.Embedding(4, 2), 1, 2)
    numbers = stored(weight=np.arange(10, dtype="f4").reshape(5, 2))
    with pytest.raises(UserError, match=r"weight is \[5, 2\] in the file, but \[4, 2\] in the model"):
        fill(layer, numbers, "file")
    assert not layer.weight._is_initialized()
    report = fill(layer, numbers, "file", adapt={"weight": lambda array, wanted: array[: wanted[0]]})
    np.testing.assert_array_equal(layer.weight.numpy(), [[4, 5], [6, 7]])
    assert report.adapted == {"weight": "[5, 2] to [4, 2]"}


def test_a_share_elsewhere_than_on_a_cpu_is_set_through_paddle(linear):
    """There is no GPU here: a parameter that says so."""
    _, arrays = linear
    layer = rank_of(nn.Linear(2, 3).to(dtype="bfloat16"), 1, 2, axis=1)  # the last of three columns, and padding
    fill(layer, stored(weight=np.zeros((2, 3)), bias=arrays["bias"]), "file")
    weight = layer.weight
    names = {"dtype": weight.dtype, "shape": weight.shape, "share": weight.share, "set_value": weight.set_value}
    _write(SimpleNamespace(place=SimpleNamespace(is_cpu_place=lambda: False), **names), arrays["weight"], "file")
    expected = np.stack([arrays["weight"][:, 2].astype(ml_dtypes.bfloat16).astype("f4"), np.zeros(2, "f4")], axis=1)
    np.testing.assert_array_equal(weight.astype("float32").numpy(), expected)


def test_numbers_that_are_no_weights_are_found_in_the_own_share():
    array = np.ones((4, 2), "f4")
    array[3, 1] = np.nan
    fill(rank_of(nn.Embedding(4, 2), 0, 2), stored(weight=array), "file")
    with pytest.raises(UserError, match="tensor weight holds numbers that are no weights"):
        fill(rank_of(nn.Embedding(4, 2), 1, 2), stored(weight=array), "file")


# several tensors at a time


def test_tensors_are_read_beside_each_other(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    both = threading.Barrier(2, timeout=20)

    def reads(size: int) -> StoredTensor:
        return StoredTensor("file", (size,), np.dtype("f4"), lambda: both.wait() * np.zeros(size, "f4"))

    large = StoredTensor.of("file", np.ones(8, "f4"))
    fill(Flat(8, 4, 4), {"0": large, "1": reads(4), "2": reads(4)}, "file")  # ends only if both are begun
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    both.abort()  # now a wait is an error
    with pytest.raises(threading.BrokenBarrierError):
        fill(Flat(8, 4), {"0": large, "1": reads(4)}, "file")


def test_int8_is_rounded_beside_each_other(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    with paddle.LazyGuard():
        layer = nn.LayerList([nn.Linear(rows, 3, bias_attr=False) for rows in (8, 4, 4)])
    store_compact(layer, WeightsType.int8, "float32")
    both = threading.Barrier(2, timeout=20)

    def reads(place: int) -> StoredTensor:
        return StoredTensor("file", (4, 3), np.dtype("f4"), lambda: both.wait() * 0 + np.full((4, 3), place, "f4"))

    large = StoredTensor.of("file", np.ones((8, 3), "f4"))
    fill(layer, {"0.weight": large, "1.weight": reads(1), "2.weight": reads(2)}, "file")  # ends only if both are begun
    for place, linear in enumerate(layer):
        np.testing.assert_array_equal(linear.weight.numpy(), 127)
        np.testing.assert_allclose(linear.weight.compact.scale.numpy() * 127, place or 1, rtol=1e-6)


def test_what_is_read_at_a_time_is_no_larger_than_the_largest_tensor(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "4")
    sizes = np.random.default_rng(0).permutation([100, 100, *[30] * 40, *[60] * 20]).tolist()
    lock, alive, seen = threading.Lock(), 0, []

    def count(change: int) -> None:
        nonlocal alive
        with lock:
            alive += change
            seen.append(alive)

    def read(size: int) -> np.ndarray:
        array = np.full(size, size, "f4")
        count(size)
        weakref.finalize(array, count, -size)
        return array

    layer = Flat(*sizes)
    tensors = {str(i): StoredTensor("file", (n,), np.dtype("f4"), lambda n=n: read(n)) for i, n in enumerate(sizes)}
    fill(layer, tensors, "file")
    assert max(seen) <= 100 and seen[-1] == 0
    assert all((parameter.numpy() == size).all() for parameter, size in zip(layer.parameters(), sizes, strict=True))


def test_an_error_in_a_thread_is_told_and_the_first_of_two(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    bad = {str(i): StoredTensor.of(f"tensor {i}", np.full(4, np.nan if i in (3, 5) else 1, "f4")) for i in range(8)}
    with pytest.raises(UserError, match="tensor 3 holds numbers that are no weights"):
        fill(Flat(*[4] * 8), bad, "file")


# what is kept and what is frozen


def test_split_of_parameters_and_buffers():
    model = Model()
    model.register_buffer("count", paddle.zeros([1]))
    model.register_buffer("scratch", paddle.zeros([1]), persistable=False)
    model.vision.register_buffer("mean", paddle.zeros([1]))
    model.vision_proj = nn.Linear(1, 1)  # not below "vision"
    model.shared = model.language_proj
    freeze(model.vision)
    kept, frozen = split_state(model)
    own = {"language_proj.weight", "language_proj.bias"}
    assert set(kept) == {*own, "vision_proj.weight", "vision_proj.bias", "count"}
    assert set(frozen) == {"vision.weight", "vision.bias", "vision.mean"}


@pytest.mark.parametrize(
    ("name", "parts", "below"),
    [("vision.x", ["vision"], True), ("vision", ["vision"], True), ("vision_proj.x", ["vision"], False), ("x", [""], True)],
)
def test_is_below(name, parts, below):
    assert is_below(name, parts) == below
