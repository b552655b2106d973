"""Failures: Young's and Daly's formulas, against the best interval by search and a simulation."""

import random
from math import exp, sqrt

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.failures import (
    Reliability,
    best_interval,
    goodput,
    slowest_of,
    useful_share,
)


@pytest.mark.parametrize(("save", "between"), [(60.0, 36_000.0), (300.0, 20_000.0), (5.0, 1e6)])
def test_the_interval_is_the_best(save: float, between: float) -> None:
    best = best_interval(save, between)
    assert best == pytest.approx(sqrt(2 * save * between) - save, rel=0.06)
    at_best = useful_share(best, save, 600, between)
    tried = [useful_share(best * 1.02**step, save, 600, between) for step in range(-100, 100)]
    assert max(tried) <= at_best * (1 + 1e-5)


def test_the_share_is_that_of_a_simulated_run() -> None:
    save, restart, between = 60.0, 300.0, 3600.0
    interval = best_interval(save, between)
    chance, seconds, done = random.Random(3), 0.0, 0
    while done < 20_000:
        left = chance.expovariate(1 / between)
        if left >= interval + save:
            seconds, done = seconds + interval + save, done + 1
            continue
        seconds += left
        # A failure during a restart starts it again.
        while (left := chance.expovariate(1 / between)) < restart:
            seconds += left
        seconds += restart
    simulated = done * interval / seconds
    assert useful_share(interval, save, restart, between) == pytest.approx(simulated, rel=0.01)


def test_the_slowest_of_many_is_as_drawn() -> None:
    chance = random.Random(4)
    for count in (16, 1000):
        drawn = [max(chance.gauss(1, 0.05) for _ in range(count)) for _ in range(1500)]
        assert slowest_of(count, 0.05) == pytest.approx(sum(drawn) / len(drawn), abs=0.006)
    assert slowest_of(1, 0.05) == slowest_of(1000, 0.0) == 1.0


def test_more_devices_keep_less() -> None:
    shares = [goodput(n, Reliability(step_deviation=0.02)).share for n in (1_000, 10_000, 100_000)]
    assert shares == sorted(shares, reverse=True)
    found = goodput(100_000, Reliability())
    assert found.between_failures == 1800.0
    assert 0 < found.useful < exp(-found.interval / found.between_failures)
    # Failures before the first checkpoint is written leave nothing.
    assert goodput(10**9, Reliability()).useful == 0.0


def test_wrong_values() -> None:
    with pytest.raises(ConfigError, match=r"save_seconds=0.0; it must be above 0"):
        Reliability(save_seconds=0.0)
    with pytest.raises(ConfigError, match=r"step_deviation=-1.0; it must not be below 0"):
        Reliability(step_deviation=-1.0)
