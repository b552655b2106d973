"""Signals become a wish within the block, and nothing of it is left afterwards."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from fivefold.parallel_core.training import stopping
from fivefold.parallel_core.training.stopping import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish_as_long_as_the_block_lasts(number: int) -> None:
    stop = StopRequest()
    for _ in range(2):
        with stop.heard():
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
        assert not stop.asked


def test_sigterm_any_number_of_times_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SAME_STROKE", 0.0)
    stop = StopRequest()
    with stop.heard():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.asked


def test_a_second_ctrl_c_interrupts_unless_it_is_the_same_stroke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopRequest()
    with stop.heard():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
    monkeypatch.setattr(stopping, "_SAME_STROKE", 0.0)
    with pytest.raises(KeyboardInterrupt), stop.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    assert not stop.asked


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so() -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.heard():
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_other_threads_are_not_asked() -> None:
    seen: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopRequest().heard():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
