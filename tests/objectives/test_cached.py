"""Cached-gradient contrast: micro-batches of a real, tiny stage 1 give the gradients of one large batch."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.config.task import PretrainStage1Config
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.freeze import set_train_mode
from blip2x.objectives.cached import choose
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.parallel.context import Context

MICRO, DEC = 4, 19
# Float32 sums over micro-batches round otherwise than those of the large batch: by 1e-7, as the gradients are 0.3 at most and
# the losses 3. The smallest of a parameter's largest gradient is 1e-3 (but for keys' biases, which no score depends on).
ATOL = 1e-6


def split(batch: dict[str, paddle.Tensor]) -> list[dict[str, paddle.Tensor]]:
    columns = zip(*(tensor.split(MICRO) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, column, strict=True)) for column in columns]


def objective_of(model: Stage1Model, **changes) -> Stage1Objective:
    values = {"itc_weight": 1.0, "itm_weight": 0.7, "lm_weight": 0.5, "contrast_steps": 0, "label_smoothing": 0.1}
    values |= {"gather_gradient": True, "cached_contrast": False}
    objective = Stage1Objective(model, Context(), PretrainStage1Config(**{**values, **changes}), dec_id=DEC)
    set_train_mode(objective)
    return objective


def step(objective: Stage1Objective, batches: list[dict[str, paddle.Tensor]]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """As the loop goes: mean parts and gradients of one optimizer step."""
    paddle.seed(5)  # of the negatives
    rows = []
    for batch in objective.prepare(batches):
        parts = objective(batch)
        (parts["loss"] / len(batches)).backward()
        rows.append({name: float(value) for name, value in parts.items()})
    gradients = {name: p.grad.numpy() for name, p in objective.model.named_parameters() if p.grad is not None}
    objective.clear_gradients()
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}, gradients


def furthest(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


@pytest.mark.parametrize("gather_gradient", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_micro_batches_give_the_gradients_of_the_large_batch(frozen, gather_gradient, build, pairs):
    model, batch = build(frozen=frozen), pairs
    cached = objective_of(model, cached_contrast=True, gather_gradient=gather_gradient)
    plain = objective_of(model, gather_gradient=gather_gradient)
    parts, expected = step(plain, [batch])
    found_parts, found = step(cached, split(batch))
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert expected.keys() == trained and {"temp", "ln_vision.weight"} <= trained
    assert any(name.startswith("vision.") for name in trained) is not frozen
    assert found_parts == pytest.approx(parts, rel=1e-6)
    assert furthest(found, expected) < ATOL
    assert furthest(step(plain, split(batch))[1], expected) > 0.1  # of contrast within micro-batches


def test_captions_weigh_by_their_tokens_also_without_the_cache(build, pairs):
    objective = objective_of(build(), itc_weight=0.0, itm_weight=0.0)
    parts, expected = step(objective, [pairs])
    found_parts, found = step(objective, split(pairs))
    assert found_parts["lm"] == pytest.approx(parts["lm"], rel=1e-6) and furthest(found, expected) < ATOL


def test_negatives_that_are_given_are_places_in_the_whole_step(build, pairs):
    batch = {**pairs, "negative_image_B": paddle.to_tensor([7, 4, 0, 0, 3, 2, 5, 1])}
    batch["negative_text_B"] = paddle.to_tensor([2, 7, 6, 5, 0, 3, 1, 4])
    model = build()
    parts, expected = step(objective_of(model), [batch])
    found_parts, found = step(objective_of(model, cached_contrast=True), split(batch))
    assert found_parts == pytest.approx(parts, rel=1e-6) and furthest(found, expected) < ATOL


def test_contrast_alone_at_first_and_a_temperature_at_its_bound(build, pairs):
    model, batch = build(), pairs

    def run(objective, done, batches):
        model.temp.set_value(paddle.to_tensor([0.9]))
        objective.set_step(done)
        return step(objective, batches)

    plain, cached = (objective_of(model, contrast_steps=1, cached_contrast=value) for value in (False, True))
    for done, names in ((0, {"loss", "itc", "temperature"}), (1, {"loss", "itc", "temperature", "itm", "itm_accuracy", "lm"})):
        found_parts, found = run(cached, done, split(batch))
        parts, expected = run(plain, done, [batch])
        assert parts.keys() == found_parts.keys() == names
        assert found_parts == pytest.approx(parts, rel=1e-6) and furthest(found, expected) < ATOL
        assert found_parts["temperature"] == 0.5 and found["temp"] != 0


@pytest.mark.parametrize("frozen", [True, False])
def test_dropout_is_the_same_in_both_passes_and_never_again(frozen, build, pairs, monkeypatch):
    model, batches, draws = build(frozen=frozen, dropout=0.3), split(pairs)[:1] * MICRO, []
    features = {"query_features": [], "text_features": []}

    def watch(name, rows):
        method = getattr(model, name)

        def watched(*inputs):
            draw, outputs = float(paddle.rand([1])), method(*inputs)
            rows.append((draw, (outputs if isinstance(outputs, paddle.Tensor) else outputs[1]).numpy()))
            return outputs

        monkeypatch.setattr(model, name, watched)

    for name, rows in features.items():
        watch(name, rows)
    matching, passes, encode = model.itm_logits, [], model.vision.forward
    monkeypatch.setattr(model, "itm_logits", lambda *inputs: draws.append(float(paddle.rand([1]))) or matching(*inputs))
    monkeypatch.setattr(model.vision, "forward", lambda image: passes.append(1) or encode(image))
    objective = objective_of(model, cached_contrast=True)
    for _ in range(2):
        draws.append(float(paddle.rand([1])))
        for batch in objective.prepare(batches):
            objective(batch)["loss"].backward()

    for rows in features.values():
        for ahead, again in ((rows[:MICRO], rows[MICRO : 2 * MICRO]), (rows[2 * MICRO : 3 * MICRO], rows[3 * MICRO :])):
            for (draw, output), (same_draw, same_output) in zip(ahead, again, strict=True):
                np.testing.assert_array_equal(output, same_output)
                assert draw == same_draw
                draws.append(draw)
        # the same pairs four times, each time under another mask
        apart = [np.abs(one - other).max() for n, (_, one) in enumerate(rows[:MICRO]) for _, other in rows[:n]]
        assert min(apart) > 1e-3
    # what comes after the features goes on where these ended, and nothing is ever drawn from the same place
    assert len(set(draws)) == len(draws) == 2 * (1 + 4 * MICRO)  # features of both, and matching in two passes
    # a frozen image goes through the encoder once; a trained one ahead, for its features and as a negative
    assert len(passes) == 2 * MICRO * (1 if frozen else 3)


def test_evaluation_needs_no_other_micro_batches(build, pairs):
    model = build()
    values = []
    for cached in (True, False):
        objective = objective_of(model, cached_contrast=cached)
        objective.eval()
        paddle.seed(5)
        values.append({name: float(value) for name, value in objective(pairs).items()})
    assert values[0] == values[1]


class Ranks(Context):
    """Rank 1 of three; `all_gather` makes up what the others have."""

    def __init__(self):
        super().__init__(rank=1, world_size=3)

    def all_gather(self, tensor):
        return paddle.concat([tensor - 100, tensor, tensor + 100])


def test_rows_of_any_rank_and_micro_batch_are_found():
    """Numbers are 10 * micro-batch + row, and -100 or 100 on the other ranks."""
    micro_batches = [paddle.to_tensor([[0.0], [1.0]]), paddle.to_tensor([[10.0], [11.0]])]
    every = [-100.0, -99, -90, -89, 0, 1, 10, 11, 100, 101, 110, 111]
    for first in range(0, 12, 4):
        index = paddle.to_tensor([first + 3, first, first + 2, 11 - first])
        rows = choose(micro_batches, index, Ranks())
        assert [list(part.shape) for part in rows] == [[2, 1], [2, 1]]
        assert paddle.concat(rows).flatten().tolist() == [every[place] for place in index.tolist()]


def test_it_needs_several_micro_batches():
    words = ["task=pretrain_stage1", "task.cached_contrast=true"]
    with pytest.raises(UserError, match=r"task\.cached_contrast=true does nothing with task\.accumulate=1"):
        compose_config(words)
    assert compose_config([*words, "task.accumulate=2"]).task.cached_contrast
