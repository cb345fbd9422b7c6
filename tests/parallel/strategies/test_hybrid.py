"""What is refused before any process group is made; what runs is in tests/distributed."""

import paddle
import pytest

from blip2x.config.run import Device, HybridConfig
from blip2x.errors import UserError
from blip2x.parallel.degrees import Degrees
from blip2x.parallel.strategies.hybrid import build, check_sharding


def config(**degrees):
    return HybridConfig(**{"dp": 1, "sharding": 1, "sharding_stage": 0, "tp": 1, "tp_vision": False, **degrees})


def test_one_process_needs_no_group():
    context = build(config(dp=-1), Device.cpu)
    assert (context.world_size, context.data_size, context.tensor.size) == (1, 1, 1)
    assert not paddle.distributed.is_initialized()


@pytest.mark.parametrize(("stage", "sharding"), [(0, 2), (1, 1), (3, 1)])
def test_stage_and_degree_must_agree(stage, sharding):
    with pytest.raises(UserError, match=f"sharding_stage={stage} with parallelism.sharding={sharding}"):
        check_sharding(stage, Degrees(1, sharding), "gpu:0")


def test_parameters_are_not_sharded_on_a_cpu():
    check_sharding(3, Degrees(1, 2), "gpu:0")
    with pytest.raises(UserError, match="sharding_stage=3 needs GPUs"):
        check_sharding(3, Degrees(1, 2), "cpu")


@pytest.mark.parametrize(
    ("stage", "degrees"),
    [(1, Degrees(2, 2)), (2, Degrees(1, 4)), (0, Degrees(2, 1, 2)), (1, Degrees(1, 2, 2)), (0, Degrees(1, 1, 4))],
)
def test_groups_within_groups_are_refused_on_a_cpu(stage, degrees):
    check_sharding(stage, degrees, "gpu:0")
    with pytest.raises(UserError, match="over 4 CPU processes"):
        check_sharding(stage, degrees, "cpu")


@pytest.mark.parametrize(
    ("stage", "degrees"), [(1, Degrees(1, 2)), (2, Degrees(1, 2)), (0, Degrees(1, 1, 2)), (0, Degrees(4, 1))]
)
def test_two_processes_or_dp_run_on_a_cpu(stage, degrees):
    check_sharding(stage, degrees, "cpu")


def test_too_few_processes_say_both_numbers():
    with pytest.raises(UserError, match=r"= 2, but 1 process"):
        build(config(dp=2), Device.cpu)
