"""Interleaved rounds: whatever disturbs the machine disturbs all contenders alike."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Seconds of one call by clock.
Reading = dict[str, float]
Timer = Callable[[], Reading]

# Fewer have no median worth the name; the budget of seconds does not cut them.
_LEAST_ROUNDS = 3


@dataclass(kw_only=True, slots=True)
class Rounds:
    """What the rounds gave.

    Attributes:
        seconds: times by contender and clock, one a round.
        errors: what contenders raised; they have no times.
    """

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


def interleave(
    timers: Mapping[str, Timer],
    *,
    repeats: int,
    seconds: float,
    shuffle: Callable[[list[str]], None] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time every contender once a round, in random order.

    Args:
        timers: by contender; each times one call. One that raises is out.
        repeats: rounds.
        seconds: no round begins after so many, except the first three.
        shuffle: orders a round in place.
        now: a clock in seconds.
    """
    shuffle = shuffle or random.Random(0).shuffle
    rounds = Rounds(seconds={name: {} for name in timers})
    start = now()
    for done in range(repeats):
        if done >= _LEAST_ROUNDS and now() - start > seconds:
            break
        order = list(rounds.seconds)
        shuffle(order)
        for name in order:
            _time(name, timers[name], rounds)
    return rounds


def _time(name: str, timer: Timer, rounds: Rounds) -> None:
    try:
        reading = timer()
    except Exception as error:
        rounds.errors[name] = error
        del rounds.seconds[name]
        return
    for clock, value in reading.items():
        rounds.seconds[name].setdefault(clock, []).append(value)
