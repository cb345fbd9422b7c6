"""What is refused before any process group is made; what runs is in tests/distributed."""

import paddle
import pytest

from blip2x.config.run import Device, HybridConfig
from blip2x.errors import UserError
from blip2x.parallel.degrees import Degrees
from blip2x.parallel.strategies.hybrid import build, check_sharding


def test_one_process_needs_no_group():
    context = build(HybridConfig(dp=-1, sharding=1, sharding_stage=0), Device.cpu)
    assert context.world_size == 1
    assert not paddle.distributed.is_initialized()


@pytest.mark.parametrize(("stage", "sharding"), [(0, 2), (1, 1), (3, 1)])
def test_stage_and_degree_must_agree(stage, sharding):
    with pytest.raises(UserError, match=f"sharding_stage={stage} with parallelism.sharding={sharding}"):
        check_sharding(stage, Degrees(1, sharding), "gpu:0")


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_and_parameters_are_not_sharded_on_a_cpu(stage):
    check_sharding(stage, Degrees(1, 2), "gpu:0")
    with pytest.raises(UserError, match=f"sharding_stage={stage} needs GPUs"):
        check_sharding(stage, Degrees(1, 2), "cpu")


def test_stage_1_on_a_cpu_is_two_processes():
    check_sharding(1, Degrees(1, 2), "cpu")
    with pytest.raises(UserError, match="4 CPU processes"):
        check_sharding(1, Degrees(2, 2), "cpu")


def test_too_few_processes_say_both_numbers():
    with pytest.raises(UserError, match=r"= 2, but 1 process"):
        build(HybridConfig(dp=2, sharding=1, sharding_stage=0), Device.cpu)
