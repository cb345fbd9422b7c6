"""Means per token: micro-batches and ranks whose captions differ in length give the loss and gradients of one large batch.

So do batches that say where their targets are, so that nothing else is predicted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.losses.lm import lm_loss
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.objectives import language as language_objective
from blip2x.objectives.language import LanguageObjective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.objectives.tokens import weighed, with_token_shares
from blip2x.parallel.context import Context

ROWS, LENGTH = 6, 7
LENGTHS = paddle.to_tensor([2, 3, 7, 6, 1, 2])


class Reader(nn.Layer):
    """Two queries, learned, before a language model."""

    def __init__(self, language: nn.Layer):
        super().__init__()
        self.language = language
        self.query_1QD = self.create_parameter([1, 2, language.width])

    def encoded(self, batch):
        return batch["image_BCHW"]

    def soft_prompt(self, encoded_BCHW):
        return self.query_1QD.expand([encoded_BCHW.shape[0], -1, -1])


def opt() -> nn.Layer:
    return OptLanguageModel(width=8, depth=1, num_heads=2, mlp_width=12, vocab_size=11, max_positions=16, dropout=0.0)


def t5() -> nn.Layer:
    sizes = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "head_width": 4, "mlp_width": 12}
    relative = {"relative_buckets": 8, "relative_max_distance": 16}
    return T5LanguageModel(**sizes, **relative, vocab_size=11, exact_gelu=True, dropout=0.0)


def texts() -> dict[str, paddle.Tensor]:
    ids, place = paddle.randint(1, 11, [ROWS, LENGTH]), paddle.arange(LENGTH).unsqueeze(0)
    mask = (place < LENGTHS.unsqueeze(1)).astype("int64")
    encoder_decoder = {"input_ids_BL": ids, "input_mask_BL": mask, "output_ids_BT": ids, "output_mask_BT": mask}
    # the fifth text is one token long: a decoder, which is given the first one, has nothing to learn there
    label_mask = mask * (place > 0).astype("int64")
    decoder = {"text_ids_BL": ids, "text_mask_BL": mask, "label_mask_BL": label_mask}
    return {"image_BCHW": paddle.zeros([ROWS, 3, 2, 2]), **decoder, **encoder_decoder}


@pytest.fixture(params=["language opt", "language t5", "stage2 opt", "stage2 t5"])
def case(request) -> tuple[Callable[..., nn.Layer], int]:
    """Gives an objective, always of one model, a context; and how many tokens `texts` has for it to predict."""
    stage, family = request.param.split()
    paddle.seed(0)
    language = {"opt": opt, "t5": t5}[family]()
    model = Reader(language) if stage == "stage2" else language
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    objective = Stage2Objective if stage == "stage2" else LanguageObjective
    return lambda *context: objective(model, *context), int((LENGTHS - (family == "opt")).sum())


def step(objectives: list[nn.Layer], shares: list[list[dict[str, paddle.Tensor]]]) -> tuple[float, dict[str, np.ndarray]]:
    """Each objective is a rank with its micro-batches: mean loss and mean gradients."""
    losses = []
    for objective, batches in zip(objectives, shares, strict=True):
        for batch in objective.prepare(batches):
            loss = objective(batch)["loss"]
            (loss / (len(batches) * len(objectives))).backward()
            losses.append(float(loss))
    gradients = {name: p.grad.numpy() for name, p in objectives[0].named_parameters() if p.grad is not None}
    objectives[0].clear_gradients()
    return float(np.mean(losses)), gradients


def rows(batch: dict[str, paddle.Tensor], *slices: slice) -> list[dict[str, paddle.Tensor]]:
    return [{name: tensor[part] for name, tensor in batch.items()} for part in slices]


def language_of(objective: nn.Layer) -> nn.Layer:
    return objective.language if isinstance(objective, LanguageObjective) else objective.model.language


def with_places(objective: nn.Layer, batch: dict[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
    """As the collates make it."""
    mask = batch["output_mask_BT" if language_of(objective).is_encoder_decoder else "label_mask_BL"]
    return {**batch, "target_place_N": paddle.to_tensor(np.flatnonzero(mask.numpy()))}


@pytest.fixture
def predicted(monkeypatch) -> list[int]:
    """How many positions' words are predicted, at each call of the loss."""
    counts = []

    def counted(logits, labels):
        counts.append(labels.size)
        return lm_loss(logits, labels)

    monkeypatch.setattr(language_objective, "lm_loss", counted)
    return counts


class Rank(Context):
    """One of two; `totals` are the sums over both."""

    def __init__(self, rank: int, total: float):
        super().__init__(rank=rank, world_size=2)
        object.__setattr__(self, "sum", total)

    def total(self, tensor):
        return paddle.full_like(tensor, self.sum)


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=2e-6)
    assert found[1].keys() == expected[1].keys() and max(np.abs(g).max() for g in expected[1].values()) > 0.05
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=2e-6, err_msg=name)  # float32, gradients of about 1


@pytest.mark.parametrize("places", [False, True])
def test_micro_batches_and_ranks_give_the_mean_of_the_large_batch(case, places):
    make, count = case
    batch, alone = texts(), make()
    expected = step([alone], [[batch]])
    parts = rows(batch, slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6))
    if places:  # a decoder has none in the third
        parts = [with_places(alone, part) for part in parts]
    assert_same(step([alone], [parts]), expected)
    assert_same(step([make(Rank(rank, count)) for rank in range(2)], [parts[:2], parts[2:]]), expected)
    assert abs(np.mean([float(alone(part)["loss"]) for part in parts]) - expected[0]) > 0.01  # the means' mean


def test_a_single_batch_is_computed_as_in_evaluation(case):
    make, _ = case
    batch, objective = texts(), make()
    (prepared,) = objective.prepare([batch])
    assert float(prepared["token_share"]) == 1
    assert float(objective(prepared)["loss"]) == float(objective(batch)["loss"])


def test_shares_without_any_token_are_0_and_not_nan():
    nothing = with_token_shares([{}, {}], [paddle.to_tensor(0), paddle.to_tensor(0)], Context())
    assert [float(weighed(paddle.ones([]), batch)) for batch in nothing] == [0, 0]


@pytest.mark.parametrize("again", [False, True])
def test_targets_alone_are_predicted_with_the_same_loss_and_gradients(case, predicted, again):
    make, count = case
    objective, batch = make(), texts()
    if isinstance(objective, Stage2Objective):  # a prompt of two tokens, which only a decoder's targets come behind
        batch["label_mask_BL"] = batch["label_mask_BL"] * (paddle.arange(LENGTH) > 1).astype("int64")
        count -= 0 if language_of(objective).is_encoder_decoder else ROWS - 1
    expected = step([objective], [[batch]])
    language_of(objective).recompute = again
    assert_same(step([objective], [[with_places(objective, batch)]]), expected)
    assert predicted == [ROWS * LENGTH, count]


def test_without_a_target_nothing_is_learned(case, predicted):
    objective, batch = case[0](), texts()
    nothing = {name: 0 * tensor if name in ("label_mask_BL", "output_mask_BT") else tensor for name, tensor in batch.items()}
    if isinstance(objective, LanguageObjective):
        nothing["text_mask_BL"] = (paddle.arange(LENGTH) == 0).astype("int64").expand([ROWS, LENGTH])
    loss, gradients = step([objective], [[with_places(objective, nothing)]])
    assert loss == 0 and gradients and predicted == [0]
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("make", [opt, t5])
def test_a_model_that_sees_no_image_is_asked_for_targets_alone(make, predicted):
    paddle.seed(0)
    objective, batch = Stage2Objective(Reader(make())), texts()
    expected = float(objective.text_loss(None, batch))
    assert float(objective.text_loss(None, with_places(objective, batch))) == pytest.approx(expected, abs=1e-6)
    assert predicted == [ROWS * LENGTH, int((LENGTHS - (make is opt)).sum())]
    first = {**batch, "label_mask_BL": batch["text_mask_BL"]}  # nothing comes before it
    assert float(objective.text_loss(None, with_places(objective, first))) == pytest.approx(expected, abs=1e-6)
