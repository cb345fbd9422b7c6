"""Means over micro-batches, steps and ranks; the first value that is no number is found with its step."""

from __future__ import annotations

import paddle
import pytest

from blip2x.engine.losses import LossRecord
from blip2x.errors import UserError
from blip2x.parallel.context import Context


class TwoRanks(Context):
    """Rank 0 of two; the other one's rows are `other` times as large."""

    other = 3.0

    def all_gather(self, tensor):
        return paddle.concat([tensor, tensor * self.other])


def parts(loss: float, itc: float = 0.0) -> dict[str, paddle.Tensor]:
    return {"loss": paddle.to_tensor(loss), "itc": paddle.to_tensor([itc])}  # of no axis and of one


def test_means_over_micro_batches_and_steps_since_the_last_reading():
    record = LossRecord("s", Context())
    record.add(1, [parts(1.0, 10.0), parts(2.0, 20.0)])
    record.add(2, [parts(6.0, 30.0), parts(7.0, 40.0)])
    assert record.read() == {"loss": 4.0, "itc": 25.0}
    record.add(3, [parts(5.0, 1.0)])
    assert record.read() == {"loss": 5.0, "itc": 1.0}


def test_a_part_that_joins_later_is_averaged_over_its_own_steps():
    record = LossRecord("s", Context())
    record.add(1, [{"loss": paddle.to_tensor(1.0)}])
    record.add(2, [parts(3.0, 5.0)])
    record.add(3, [parts(5.0, 7.0)])
    assert record.read() == {"loss": 3.0, "itc": 6.0}


def test_mean_over_ranks():
    record = LossRecord("s", TwoRanks(world_size=2))
    record.add(1, [parts(1.0)])
    record.add(2, [parts(2.0)])
    assert record.read()["loss"] == 3.0  # of 1, 2 and 3, 6


def test_one_process_on_a_cpu_finds_nan_at_once():
    record = LossRecord("s", Context())
    with pytest.raises(UserError, match="s: loss part 'itc' is nan at step 7"):
        record.add(7, [parts(1.0, float("nan"))])


@pytest.mark.parametrize("context", [Context(device="gpu:0"), TwoRanks(world_size=2)])
def test_elsewhere_the_first_bad_step_is_named_when_it_is_read(context):
    record = LossRecord("s", context)
    for step, loss in enumerate((1.0, float("inf"), float("nan")), 11):
        record.add(step, [parts(loss)])
    with pytest.raises(UserError, match="s: loss part 'loss' is inf at step 12"):
        record.read()


def test_another_rank_s_bad_value_is_found_here_too():
    context = TwoRanks(world_size=2)
    object.__setattr__(context, "other", float("nan"))
    record = LossRecord("s", context)
    record.add(1, [parts(1.0)])
    with pytest.raises(UserError, match="loss part 'loss' is nan at step 1"):
        record.read()
