"""Ranks that are late are waited for, and lost ones are not."""

from __future__ import annotations

import threading
import time

import pytest

from blip2x.errors import UserError
from blip2x.parallel.meeting import Host, host_name, join


@pytest.fixture
def meetings():
    """Rank 0's meeting and those of two others."""
    host, joined = Host("127.0.0.1"), []

    def come():
        joined.append(join(host.address, host.key))

    threads = [threading.Thread(target=come) for _ in range(2)]
    for thread in threads:
        thread.start()
    first = host.receive(2)
    for thread in threads:
        thread.join()
    return [first, *joined]


def wait_in_threads(meetings):
    """What each rank says after the meeting, in the order of their leaving."""
    said = []

    def wait(rank):
        try:
            meetings[rank].wait()
            said.append((rank, "met"))
        except UserError as error:
            said.append((rank, str(error)))

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in range(len(meetings))]
    return threads, said


@pytest.mark.parametrize("late", [0, 2])
def test_nobody_goes_on_before_the_last_has_come(meetings, late):
    for _ in range(2):  # again and again
        threads, said = wait_in_threads(meetings)
        for rank, thread in enumerate(threads):
            if rank != late:
                thread.start()
        time.sleep(0.1)
        assert said == []
        threads[late].start()
        for thread in threads:
            thread.join(10)
        assert sorted(said) == [(0, "met"), (1, "met"), (2, "met")]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_gone_ends_the_wait_of_all(meetings, lost):
    threads, said = wait_in_threads(meetings)
    for rank, thread in enumerate(threads):
        if rank != lost:
            thread.start()
    for connection in meetings[lost]._connections:
        connection.close()
    for rank, thread in enumerate(threads):
        if rank != lost:
            thread.join(10)
    assert {rank for rank, _ in said} == {0, 1, 2} - {lost}
    assert all("can no longer reach another rank" in sentence for _, sentence in said)


def test_a_stranger_is_not_let_in(meetings):
    from multiprocessing import AuthenticationError

    host = Host("127.0.0.1")
    refused = []

    def come():
        try:
            join(host.address, b"guess")
        except AuthenticationError:
            refused.append(True)

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(AuthenticationError):
        host.receive(1)
    thread.join(10)
    assert refused == [True]


def test_rank_0_is_where_the_launcher_says(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINER_ENDPOINTS", raising=False)
    assert host_name() == "127.0.0.1"
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "node7:6170,node8:6170")
    assert host_name() == "node7"
