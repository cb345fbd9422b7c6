"""The device that is asked for, or one sentence."""

import paddle
import pytest

from blip2x.config.run import Device
from blip2x.errors import UserError
from blip2x.parallel.devices import select_device, started_processes


def test_cpu_is_always_there():
    assert select_device(Device.cpu) == "cpu"
    assert paddle.get_device() == "cpu"


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="needs the CPU build")
def test_cpu_build_has_no_gpu():
    assert select_device(Device.auto) == "cpu"
    with pytest.raises(UserError, match="device=gpu"):
        select_device(Device.gpu)


def test_process_count_comes_from_the_launcher(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    assert started_processes() == 1
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    assert started_processes() == 4
