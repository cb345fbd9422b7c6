"""Each moment belongs to one part."""

from __future__ import annotations

import pytest

from blip2x.tasks.benchmarking import clock as module
from blip2x.tasks.benchmarking.clock import REST, Clock, timed


@pytest.fixture
def now(monkeypatch):
    """A time that only moves when it is told to."""
    time = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: time[0])

    def pass_by(seconds):
        time[0] += seconds

    return pass_by


class Thing:
    def outer(self, pass_by):
        pass_by(1)
        self.inner(pass_by)
        pass_by(2)

    def inner(self, pass_by):
        pass_by(4)


def test_the_innermost_part_gets_the_time(now):
    clock = Clock(lambda: None)
    with clock.running():
        now(8)
        with clock.part("a"):
            now(16)
            with clock.part("b"):
                now(32)
            now(64)
        with clock.part("a"):
            now(128)
    assert clock.seconds == {REST: 8, "a": 16 + 64 + 128, "b": 32}


def test_methods_are_timed_and_are_as_before_afterwards(now):
    thing, clock = Thing(), Clock(lambda: None)
    with timed(clock, [(thing, "outer", "a"), (thing, "inner", "b")]), clock.running():
        thing.outer(now)
    assert clock.seconds == {REST: 0, "a": 3, "b": 4}
    assert vars(thing) == {}
    thing.outer(now)
    assert clock.seconds == {REST: 0, "a": 3, "b": 4}


def test_a_method_that_fails_leaves_no_part_open(now):
    thing, clock = Thing(), Clock(lambda: None)
    with pytest.raises(TypeError), timed(clock, [(thing, "inner", "a")]), clock.running():
        thing.inner(None)
    with clock.running():
        now(1)
    assert clock.seconds == {REST: 1}


def test_each_change_waits_for_the_device():
    waits = []
    clock = Clock(lambda: waits.append(1))
    with clock.part("a"):
        pass
    assert not waits  # it does not run
    with clock.running(), clock.part("a"):
        pass
    assert len(waits) == 4
