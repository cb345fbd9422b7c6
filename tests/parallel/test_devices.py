"""The device that is asked for, or one sentence."""

import os

import paddle
import pytest

from blip2x.config.run import Device
from blip2x.errors import UserError
from blip2x.parallel.devices import select_device, started_processes


def test_cpu_is_always_there(monkeypatch):
    monkeypatch.delenv("PADDLE_DISTRI_BACKEND", raising=False)
    assert select_device(Device.cpu) == "cpu"
    assert paddle.get_device() == "cpu"
    assert os.environ["PADDLE_DISTRI_BACKEND"] == "gloo"  # else paddle takes a way of old that has no process group


@pytest.mark.parametrize(("card", "name"), [("3", "gpu:3"), (None, "gpu:0"), ("2,3", "gpu:2")])
def test_a_rank_has_the_card_that_the_launcher_names(monkeypatch, card, name):
    chosen = pretend_gpus(monkeypatch, 4, card)
    assert select_device(Device.auto) == select_device(Device.gpu) == name
    assert chosen == [name, name] and "PADDLE_DISTRI_BACKEND" not in os.environ


def test_more_ranks_than_cards(monkeypatch):
    pretend_gpus(monkeypatch, 2, "2")
    with pytest.raises(UserError, match="is to use GPU 2, but paddle finds 2"):
        select_device(Device.auto)


def pretend_gpus(monkeypatch, count, card):
    chosen = []
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: count)
    monkeypatch.setattr(paddle, "set_device", chosen.append)
    monkeypatch.delenv("PADDLE_DISTRI_BACKEND", raising=False)
    monkeypatch.delenv("FLAGS_selected_gpus", raising=False)
    if card is not None:
        monkeypatch.setenv("FLAGS_selected_gpus", card)
    return chosen


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
