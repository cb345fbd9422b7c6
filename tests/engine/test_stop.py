import os
import signal
import threading

import pytest

from blip2x.engine.stop import AT_ONCE, SIGNALS, StopSignals, stopping_at_once
from blip2x.errors import Interrupted


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_only_noted(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
    assert signal.getsignal(number) is before


def test_a_launcher_may_repeat_its_signal_and_a_person_is_obeyed():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_go_back_after_an_error_and_none_are_set_in_a_thread():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignals():
        _ = 1 / 0
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def handlers_go_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", AT_ONCE)
def test_outside_of_a_training_a_signal_ends_the_program_and_its_repetition_does_not(handlers_go_back, number):
    with pytest.raises(Interrupted, match=f"^{number.name}; what was finished is kept"), stopping_at_once():
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # ignored: the process is on its way out


def test_inside_of_a_training_a_signal_waits_and_its_repetition_behind_it_is_ignored(handlers_go_back):
    with pytest.raises(Interrupted, match="saved"), stopping_at_once(), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        raise Interrupted("saved")
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_a_training_a_launcher_ends_what_is_left_of_a_failed_job():
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at_once():
        assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_nothing_stays_changed(handlers_go_back):
    with stopping_at_once(), StopSignals():
        pass
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers_go_back
