"""Which errors mean that another rank is gone, and what is made of them."""

import pytest

from blip2x.errors import UserError
from blip2x.parallel.lost_ranks import naming_lost_ranks

LOST = [  # as paddle 3.3 raises them
    RuntimeError(
        "[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:576] Read error [127.0.0.1]:40630: Connection reset by peer"
    ),
    RuntimeError("[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:546] Connection closed by peer [10.0.0.7]:9"),
    OSError("(External) NCCL error(6), remote process exited or there was a network error."),
    RuntimeError("(Unavailable) TCP connection reset (at ../paddle/phi/core/distributed/store/tcp_utils.cc:238)"),
]
OTHERS = [
    RuntimeError("The global group is not initialized."),
    OSError("Connection reset by peer"),  # of a picture that is fetched
    ValueError("gloo/transport"),
]


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "2")


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
def test_a_broken_connection_is_one_sentence(ranks, error):
    with (
        pytest.raises(UserError, match=r"rank 2 of 4 can no longer reach another rank.*resume=auto") as caught,
        naming_lost_ranks(),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=range(len(OTHERS)))
def test_other_errors_stay_what_they_are(ranks, error):
    with pytest.raises(type(error)) as caught, naming_lost_ranks():
        raise error
    assert caught.value is error


def test_a_single_process_has_lost_nobody(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    with pytest.raises(RuntimeError), naming_lost_ranks():
        raise LOST[0]
