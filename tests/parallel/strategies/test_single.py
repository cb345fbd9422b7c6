"""One process, and no silent repetition of the same work by several."""

import pytest

from blip2x.config.run import Device, SingleConfig
from blip2x.errors import UserError
from blip2x.registry import STRATEGIES


def test_builds_the_plain_context():
    context = STRATEGIES.get("single")(SingleConfig(), Device.cpu)
    assert (context.rank, context.world_size, context.device) == (0, 1, "cpu")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match="2 were started"):
        STRATEGIES.get("single")(SingleConfig(), Device.cpu)
