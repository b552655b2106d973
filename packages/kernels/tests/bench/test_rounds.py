"""Rounds with a clock that stands still unless it is told to move."""

import pytest

from fivefold.kernels.bench.rounds import interleave


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def timers(clock: Clock, log: list[str], **lengths: float):
    def timer(name: str):
        def time():
            log.append(name)
            clock.time += lengths[name]
            return {"wall": lengths[name], "cpu": lengths[name] / 2}

        return time

    return {name: timer(name) for name in lengths}


def test_every_round_has_every_contender_once() -> None:
    clock, log = Clock(), []
    rounds = interleave(timers(clock, log, a=1, b=2, c=3), repeats=5, seconds=1e9, now=clock)
    orders = [tuple(log[i : i + 3]) for i in range(0, 15, 3)]
    assert len(log) == 15
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    assert rounds.seconds["b"] == {"wall": [2.0] * 5, "cpu": [1.0] * 5}
    assert not rounds.errors


def test_order_is_the_shufflers() -> None:
    clock, log = Clock(), []
    interleave(
        timers(clock, log, a=1, b=2), repeats=2, seconds=9, shuffle=lambda x: x.reverse(), now=clock
    )
    assert log == ["b", "a", "b", "a"]


@pytest.mark.parametrize(
    ("repeats", "seconds", "expected"),
    [(100, 10, 6), (100, 9, 5), (100, 0.1, 3), (2, 0.1, 2), (4, 100, 4)],
)
def test_number_of_rounds(repeats: int, seconds: float, expected: int) -> None:
    clock, log = Clock(), []
    interleave(timers(clock, log, a=1, b=1), repeats=repeats, seconds=seconds, now=clock)
    assert len(log) == 2 * expected


def test_one_that_raises_is_out_and_the_rest_goes_on() -> None:
    clock, log = Clock(), []
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broke")
        return {"wall": 1.0, "cpu": 1.0}

    both = timers(clock, log, a=1) | {"b": breaks}
    rounds = interleave(both, repeats=5, seconds=1e9, now=clock)
    assert len(calls) == 2
    assert len(rounds.seconds["a"]["wall"]) == 5
    assert "b" not in rounds.seconds
    assert str(rounds.errors["b"]) == "broke"


def test_ctrl_c_is_no_error_of_a_contender() -> None:
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupted}, repeats=1, seconds=1)
