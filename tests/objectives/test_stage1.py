"""Stage 1: which image meets which text in each of the three losses, on a model that records what it is asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from blip2x.config.task import PretrainStage1Config
from blip2x.losses.itc import contrast_targets, itc_loss, same_image, similarities
from blip2x.models.places import at_places
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.parallel.context import Context

PATCHES, WIDTH, VOCABULARY, DEC = 2, 5, 13, 12
IDS = [[101, 5, 6, 9], [101, 7, 9, 0], [101, 8, 9, 0], [101, 6, 9, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


class QFormer(nn.Layer):
    def look(self, patch_BPD):
        return [(patch_BPD,)]

    def caption_logits(self, ids_BL, mask_BL, cache, place_N):
        self.inputs, self.cache = (ids_BL.numpy(), mask_BL.numpy()), cache
        self.logits_BLV = paddle.randn([*ids_BL.shape, VOCABULARY])
        return at_places(self.logits_BLV, place_N)


class Vision(nn.Layer):
    def __init__(self):
        super().__init__()
        self.scale = self.create_parameter([], default_initializer=nn.initializer.Constant(1.0))
        self.passes = 0

    def forward(self, image_BCHW):
        self.passes += 1
        rows = image_BCHW.shape[0]
        return self.scale * image_BCHW[:, 0, 0, 0].reshape([rows, 1, 1]).expand([rows, PATCHES, WIDTH])


class Model(nn.Layer):
    """Patches say which image they are of, texts which text; everything random is recorded.

    `matched` and `logits_N2` are of the pairs, then of the texts with other images, then of the images with other texts.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.vision = Vision()
        self.ln_vision = nn.Identity()
        self.qformer = QFormer()
        self.temp = self.create_parameter([1], default_initializer=nn.initializer.Constant(temperature))

    def encoded(self, batch):
        return self.vision(batch["image_BCHW"])

    def query_features(self, image):
        rows = image[0][0].shape[0]
        self.image_BQE = F.normalize(paddle.randn([rows, 3, 4]), axis=-1)
        return paddle.zeros([rows, 3, WIDTH]), self.image_BQE, "cache of the image pass"

    def text_features(self, ids_BL, mask_BL):
        self.text_BE = F.normalize(paddle.randn([ids_BL.shape[0], 4]), axis=-1)
        return self.text_BE

    def itm_logits(self, image, ids_BL, mask_BL):
        ((patch_BPD,),) = image
        images = patch_BPD.shape[0]
        shown_B = patch_BPD.mean(axis=[1, 2]).repeat_interleave(ids_BL.shape[0] // images)
        logits_B2 = paddle.randn([ids_BL.shape[0], 2]) + shown_B.unsqueeze(-1) * paddle.to_tensor([0.0, 0.1])
        ids_BL, mask_BL = (F.pad(tensor_BL, [0, 8 - tensor_BL.shape[1]]) for tensor_BL in (ids_BL, mask_BL))  # alike
        asked = shown_B.numpy(), ids_BL.numpy()[:, :4], mask_BL.numpy()[:, :4], logits_B2
        if ids_BL.shape[0] > images:
            matching_first = np.r_[0 : 2 * images : 2, 1 : 2 * images : 2]
            self.own = [column[matching_first] for column in asked]
            return logits_B2
        columns = zip(self.own, asked, strict=True)
        *self.matched, self.logits_N2 = (
            (paddle.concat if isinstance(own, paddle.Tensor) else np.concatenate)([own[:images], other, own[images:]])
            for own, other in columns
        )
        return logits_B2


def config(**changes) -> PretrainStage1Config:
    values = {
        "max_txt_len": 8,
        "itc_weight": 1.0,
        "itm_weight": 1.0,
        "lm_weight": 1.0,
        "contrast_steps": 0,
        "label_smoothing": 0.1,
        "gather_gradient": True,
        "cached_contrast": False,
    }
    return PretrainStage1Config(**{**values, **changes})


def batch(rows: int, image_ids: list[int] | None = None) -> dict[str, paddle.Tensor]:
    pixels = 1.0 + paddle.arange(rows).astype("float32")  # image b consists of the number b + 1
    return {
        "image_BCHW": pixels.reshape([rows, 1, 1, 1]).expand([rows, 3, 4, 4]),
        "image_id_B": paddle.to_tensor(image_ids or list(range(10, 10 + rows))),
        "text_ids_BL": paddle.to_tensor(IDS[:rows]),
        "text_mask_BL": paddle.to_tensor(MASK[:rows]),
    }


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    logits = logits.astype("float64")
    return np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, label[..., None], axis=-1)[..., 0]


def run(rows: int = 4, image_ids: list[int] | None = None, **changes):
    model = Model()
    objective = Stage1Objective(model, Context(), config(**changes), dec_id=DEC)
    return model, {name: float(value) for name, value in objective(batch(rows, image_ids)).items()}


def test_parts_add_up_and_the_image_is_encoded_once():
    model, parts = run(itc_weight=0.5, itm_weight=2.0, lm_weight=3.0)
    assert set(parts) == {"loss", "itc", "itm", "lm", "itm_accuracy", "temperature"}
    assert parts["loss"] == pytest.approx(0.5 * parts["itc"] + 2 * parts["itm"] + 3 * parts["lm"], rel=1e-6)
    assert parts["temperature"] == pytest.approx(0.07)
    assert model.vision.passes == 1


def test_contrast_takes_equal_image_ids_together():
    model, parts = run(image_ids=[10, 10, 11, 12])
    scores = similarities(model.image_BQE, model.text_BE, model.image_BQE, model.text_BE, paddle.to_tensor(0.07))
    ids = paddle.to_tensor([10, 10, 11, 12])
    assert parts["itc"] == pytest.approx(float(itc_loss(*scores, contrast_targets(same_image(ids, ids), 0.1))), rel=1e-6)


def contrast_gradients(image, text, temperature, smoothing, both_sides):
    """Of the contrast of distinct images: each score pulls its best query and its text, or the one of its row alone."""
    image_gradient, text_gradient = np.zeros_like(image), np.zeros_like(text)
    score = np.einsum("iqe,te->itq", image, text) / temperature
    best = score.argmax(axis=2)
    target = (1 - smoothing) * np.eye(len(text)) + smoothing / len(text)
    for rows_are_images, logits in ((True, score.max(axis=2)), (False, score.max(axis=2).T)):
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        slope = (share - target) / (2 * len(text) * temperature)
        for i, t in np.ndindex(len(image), len(text)):
            here = slope[i, t] if rows_are_images else slope[t, i]
            if rows_are_images or both_sides:
                image_gradient[i, best[i, t]] += here * text[t]
            if not rows_are_images or both_sides:
                text_gradient[t] += here * image[i, best[i, t]]
    return image_gradient, text_gradient


@pytest.mark.parametrize("both_sides", [True, False])
def test_contrast_teaches_both_sides_of_a_score_or_its_row_alone(both_sides):
    paddle.seed(0)
    image, text = F.normalize(paddle.randn([4, 3, 4]), axis=-1), F.normalize(paddle.randn([4, 4]), axis=-1)
    image.stop_gradient = text.stop_gradient = False
    model = Model()
    model.query_features = lambda _: (None, image, None)
    model.text_features = lambda *_: text
    cfg = config(itm_weight=0.0, lm_weight=0.0, gather_gradient=both_sides)
    Stage1Objective(model, Context(), cfg, dec_id=DEC)(batch(4))["loss"].backward()
    expected = contrast_gradients(image.numpy(), text.numpy(), 0.07, 0.1, both_sides)
    other = contrast_gradients(image.numpy(), text.numpy(), 0.07, 0.1, not both_sides)
    for ours, right, wrong in zip((image.grad, text.grad), expected, other, strict=True):
        np.testing.assert_allclose(ours.numpy(), right, atol=2e-6)  # numbers up to 4 in float32
        assert np.abs(right - wrong).max() > 0.1


def test_matching_sees_pairs_then_other_images_then_other_texts():
    for seed in range(5):
        paddle.seed(seed)
        model, parts = run(image_ids=[10, 10, 11, 12])
        images, ids, mask = model.matched
        own_images, own_ids = np.array([1.0, 2, 3, 4]), np.array(IDS)
        np.testing.assert_array_equal(images[:4], own_images)
        np.testing.assert_array_equal(images[8:], own_images)
        np.testing.assert_array_equal(ids[:8], np.concatenate([own_ids, own_ids]))
        text_of = [IDS.index(row) for row in ids[8:].tolist()]
        np.testing.assert_array_equal(mask[8:], np.array(MASK)[text_of])
        image_of = (images[4:8] - 1).astype(int)
        for b in range(4):  # images 0 and 1 are the same
            allowed = {2, 3} if b < 2 else {0, 1, 2, 3} - {b}
            assert text_of[b] in allowed and image_of[b] in allowed
        label = np.array([1] * 4 + [0] * 8)
        logits = model.logits_N2.numpy()
        assert parts["itm"] == pytest.approx(cross_entropy(logits, label).mean(), abs=1e-6)
        assert parts["itm_accuracy"] == pytest.approx((logits.argmax(axis=1) == label).mean())


def test_negatives_are_the_similar_ones_of_their_own_direction():
    """Image 0 resembles text 1, text 0 resembles image 2: each direction draws by its own scores."""
    features = paddle.eye(4)
    model = Model()
    image_BQE = paddle.stack([features[1], features[3], features[0], features[3]]).unsqueeze(1)
    model.query_features = lambda _: (None, image_BQE, None)
    model.text_features = lambda ids, mask: paddle.stack([features[0], features[1], features[2], features[2]])
    drawn = Counter()
    for _ in range(20):
        Stage1Objective(model, Context(), config(), dec_id=DEC)(batch(4))
        images, ids, _ = model.matched
        drawn[int(images[4]) - 1, IDS.index(ids[8].tolist())] += 1
    assert drawn == {(2, 1): 20}  # a chance of exp(-1 / 0.07) against it


def given(images: list[int], texts: list[int]) -> dict[str, paddle.Tensor]:
    return {"negative_image_B": paddle.to_tensor(images), "negative_text_B": paddle.to_tensor(texts)}


def test_negatives_that_are_given_are_the_ones_and_none_are_drawn(monkeypatch):
    """Text b meets image `negative_image_B[b]`, image b text `negative_text_B[b]`, whatever their scores and image ids are."""
    monkeypatch.setattr("blip2x.objectives.stage1.draw_negatives", lambda *_: pytest.fail("negatives were drawn"))
    model = Model()
    objective = Stage1Objective(model, Context(), config(), dec_id=DEC)
    parts = objective({**batch(4, image_ids=[10, 10, 11, 12]), **given([1, 0, 3, 2], [2, 3, 0, 0])})
    images, ids, mask = model.matched
    np.testing.assert_array_equal(images, [1, 2, 3, 4, 2, 1, 4, 3, 1, 2, 3, 4])
    np.testing.assert_array_equal(ids, [*IDS, *IDS, *(IDS[text] for text in (2, 3, 0, 0))])
    np.testing.assert_array_equal(mask, [*MASK, *MASK, *(MASK[text] for text in (2, 3, 0, 0))])
    expected = cross_entropy(model.logits_N2.numpy(), np.array([1] * 4 + [0] * 8)).mean()  # all of them count
    assert float(parts["itm"]) == pytest.approx(expected, abs=1e-6)
    assert {"loss", "itc", "itm", "lm"} <= parts.keys()


def test_given_negatives_are_places_among_all_ranks():
    model = Model()
    Stage1Objective(model, TwoRanks(), config(), dec_id=DEC)({**batch(2), **given([0, 3], [1, 2])})
    images, ids, _ = model.matched
    np.testing.assert_array_equal(images[2:4], [101, 2])  # of the other rank's first, and of this one's second
    np.testing.assert_array_equal(ids[4:], [IDS[1], IDS[0]])


def test_single_pair_has_no_negatives_and_only_its_own_match_counts():
    model, parts = run(rows=1)
    assert parts["itm"] == pytest.approx(cross_entropy(model.logits_N2.numpy()[:1], np.array([1]))[0], abs=1e-6)
    assert parts["itc"] == pytest.approx(0, abs=1e-6)  # one candidate
    assert np.isfinite(list(parts.values())).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_captions_are_written_after_dec_and_shifted(smoothing):
    model, parts = run(label_smoothing=smoothing)
    ids, mask = model.qformer.inputs
    np.testing.assert_array_equal(ids[:, 0], DEC)
    np.testing.assert_array_equal(ids[:, 1:], np.array(IDS)[:, 1:-1])  # nothing is predicted from the last
    np.testing.assert_array_equal(mask, np.array(MASK)[:, :-1])
    assert model.qformer.cache == "cache of the image pass"
    logits = model.qformer.logits_BLV.numpy()
    every = np.stack([cross_entropy(logits, np.full((4, 3), token)) for token in range(VOCABULARY)])
    losses = (1 - smoothing) * cross_entropy(logits, np.array(IDS)[:, 1:]) + smoothing * every.mean(axis=0)
    assert parts["lm"] == pytest.approx(losses[np.array(MASK)[:, 1:] == 1].mean(), abs=1e-6)


def test_matching_and_captioning_join_in_after_the_contrast_steps():
    model = Model()
    objective = Stage1Objective(model, Context(), config(contrast_steps=10, itm_weight=2.0), dec_id=DEC)
    for step in (0, 9, 10, 99):
        objective.set_step(step)
        parts = {name: float(value) for name, value in objective(batch(3)).items()}
        alone = step < 10
        assert set(parts) == {"loss", "itc", "temperature"} | (set() if alone else {"itm", "itm_accuracy", "lm"})
        others = 0 if alone else 2 * parts["itm"] + parts["lm"]
        assert parts["loss"] == pytest.approx(parts["itc"] + others, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "vary"),
    [
        ({"contrast_steps": 0}, False),
        ({"contrast_steps": 1}, True),
        ({"contrast_steps": 1, "itm_weight": 0.0}, True),
        ({"contrast_steps": 1, "itm_weight": 0.0, "lm_weight": 0.0}, False),
    ],
)
def test_it_says_whether_other_parameters_get_gradients_later(changes, vary):
    assert Stage1Objective(Model(), Context(), config(**changes), dec_id=DEC).gradients_vary is vary


def test_a_loss_of_weight_0_is_not_computed():
    model, parts = run(itm_weight=0.0)
    assert not hasattr(model, "matched") and "itm" not in parts and "lm" in parts


@pytest.mark.parametrize(("start", "end"), [(-0.2, 0.001), (0.07, 0.07), (3.0, 0.5)])
def test_temperature_stays_in_its_range_and_keeps_its_gradient(start, end):
    model = Model(start)
    objective = Stage1Objective(model, Context(), config(), dec_id=DEC)
    objective(batch(3))["loss"].backward()
    assert float(model.temp) == pytest.approx(end)
    assert model.temp.grad is not None and float(model.temp.grad) != 0


def test_evaluation_changes_no_parameter():
    model = Model(3.0)
    objective = Stage1Objective(model, Context(), config(), dec_id=DEC)
    objective.eval()
    objective(batch(3))
    assert float(model.temp) == 3.0


def test_image_encoder_learns_from_negatives_too():
    model = Model()
    objective = Stage1Objective(model, Context(), config(itc_weight=0.0, lm_weight=0.0), dec_id=DEC)
    paddle.seed(0)
    objective(batch(3))["loss"].backward()
    images, _, _ = model.matched
    share_N = F.softmax(model.logits_N2, axis=1)[:, 1].numpy() - np.array([1] * 3 + [0] * 6)
    assert float(model.vision.scale.grad) == pytest.approx(float((share_N * 0.1 * images).sum() / 9), rel=1e-4)


class TwoRanks(Context):
    """Rank 1 of two; the other one has images 7 and 8 with the same texts, and patches that are greater by 100."""

    def __init__(self):
        super().__init__(rank=1, world_size=2)

    def all_gather(self, tensor):
        return self._join(tensor.detach())

    def all_gather_with_grad(self, tensor):
        return self._join(tensor)

    def _join(self, tensor):
        if tensor.ndim == 1:
            return paddle.concat([paddle.to_tensor([7, 8]), tensor])
        other = tensor.detach() + (100 if tensor.ndim == 3 and tensor.shape[-1] == WIDTH else 0)
        return paddle.concat([other, tensor])


def test_candidates_come_from_all_ranks():
    paddle.seed(0)
    model, seen = Model(), set()
    objective = Stage1Objective(model, TwoRanks(), config(), dec_id=DEC)
    for _ in range(40):
        objective(batch(2))
        images, _, _ = model.matched
        np.testing.assert_array_equal(images[[0, 1, 4, 5]], [1, 2, 1, 2])
        seen.add(images[2])  # with the first text
    assert 1.0 not in seen and {101.0, 102.0} & seen


class Lockstep(Context):
    """One of two ranks in one graph: what the other one gathers was noted when both went through alone."""

    def __init__(self, rank: int, notes: list[list[paddle.Tensor]]):
        super().__init__(rank=rank, world_size=2)
        object.__setattr__(self, "notes", notes)
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "with_gradient", [])

    def all_gather(self, tensor):
        return self._gather(tensor).detach()

    def all_gather_with_grad(self, tensor):
        self.with_gradient.append(tensor.ndim)
        return self._gather(tensor)

    def _gather(self, tensor):
        self.calls.append(tensor)
        number = len(self.calls) - 1
        other = self.notes[1 - self.rank][number] if self.notes else tensor
        return paddle.concat([tensor, other] if self.rank == 0 else [other, tensor])

    def total(self, tensor):
        return paddle.full_like(tensor, self.notes[-1] if self.notes else 1.0)


@pytest.mark.parametrize("frozen", [True, False])
def test_two_ranks_have_the_loss_and_gradients_of_one_process_with_their_pairs(frozen, build, pairs):
    model, tokens = build(frozen=frozen), float(pairs["text_mask_BL"][:, 1:].sum())
    pairs |= given([7, 4, 0, 0, 3, 2, 5, 1], [2, 7, 6, 5, 0, 3, 1, 4])
    shares = [{name: tensor[4 * rank : 4 * rank + 4] for name, tensor in pairs.items()} for rank in range(2)]

    def gradients(loss):
        loss.backward()
        found = {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
        model.clear_gradients()
        return found

    def losses(contexts, batches):
        objectives = [Stage1Objective(model, context, config(), dec_id=19) for context in contexts]
        return [objective(*objective.prepare([part])) for objective, part in zip(objectives, batches, strict=True)]

    alone = [Lockstep(rank, []) for rank in range(2)]
    losses(alone, shares)
    notes = [*(context.calls for context in alone), tokens]
    both = losses([Lockstep(rank, notes) for rank in range(2)], shares)
    (whole,) = losses([Context()], [pairs])
    for name in ("loss", "itc", "itm", "lm", "itm_accuracy"):
        assert float(both[0][name] + both[1][name]) / 2 == pytest.approx(float(whole[name]), abs=2e-6), name
    expected, found = gradients(whole["loss"]), gradients((both[0]["loss"] + both[1]["loss"]) / 2)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-6, err_msg=name)  # float32; up to 8, of the temperature
    # features of images [B, Q, E] and texts [B, E] come with gradient; encoded images [B, P, D] unless the encoder is frozen
    assert alone[0].with_gradient == ([3, 2] if frozen else [3, 2, 3])


def learned(objective: Stage1Objective, batch: dict[str, paddle.Tensor]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Parts and gradients of a step of one micro-batch."""
    (batch,) = objective.prepare([batch])
    parts = objective(batch)
    parts["loss"].backward()
    found = {name: p.grad.numpy() for name, p in objective.model.named_parameters() if p.grad is not None}
    objective.clear_gradients()
    return {name: float(value) for name, value in parts.items()}, found


@pytest.mark.parametrize("change", ["places", "padding"])
def test_what_is_padding_is_left_out_and_changes_nothing(change, build, pairs):
    pairs |= given([7, 4, 0, 0, 3, 2, 5, 1], [2, 7, 6, 5, 0, 3, 1, 4])
    other = dict(pairs)
    if change == "places":
        other["target_place_N"] = pairs["text_mask_BL"][:, 1:].flatten().nonzero().flatten()
    else:
        other |= {name: F.pad(pairs[name], [0, 2]) for name in ("text_ids_BL", "text_mask_BL")}
    objective = Stage1Objective(build(), Context(), config(), dec_id=19)
    (parts, gradients), (expected, wanted) = learned(objective, other), learned(objective, pairs)
    assert parts == pytest.approx(expected, abs=2e-6) and gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=5e-6, err_msg=name)  # float32; up to 8


@pytest.mark.parametrize(("ranks", "times"), [(1, 1), (2, 2)])
def test_patches_become_keys_and_values_once_and_those_of_other_ranks_again(ranks, times, build, pairs):
    model, rows = build(), []
    model.qformer.layers[0].cross_attention.key.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    context = Context() if ranks == 1 else Lockstep(0, [])
    Stage1Objective(model, context, config(), dec_id=19)(pairs)["loss"].backward()
    assert rows == [8] * times


def test_recomputing_gives_the_same_gradients(build, pairs):
    pairs |= given([7, 4, 0, 0, 3, 2, 5, 1], [2, 7, 6, 5, 0, 3, 1, 4])
    results = []
    for again in (False, True):
        model = build(dropout=0.3)
        model.qformer.recompute = again
        objective = Stage1Objective(model, Context(), config(), dec_id=19)
        objective.train()
        paddle.seed(3)
        results.append(learned(objective, pairs))
    (expected, wanted), (parts, gradients) = results
    assert parts == expected
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


@pytest.mark.parametrize("cached", [False, True])
def test_nothing_in_a_step_waits_for_the_device(cached, build, pairs, monkeypatch):
    """To read a tensor's numbers is to wait until everything before it is computed."""
    objective = Stage1Objective(build(), Context(), config(cached_contrast=cached), dec_id=19)
    objective.train()
    batches = [{**pairs, "target_place_N": pairs["text_mask_BL"][:, 1:].flatten().nonzero().flatten()} for _ in range(2)]
    for name in ("numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__array__"):
        monkeypatch.setattr(paddle.Tensor, name, lambda *_, name=name: pytest.fail(f"a tensor's {name} was asked for"))
    for batch in objective.prepare(batches):
        objective(batch)["loss"].backward()
