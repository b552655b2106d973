"""Learning rates of every step."""

import math
from itertools import pairwise
from typing import Any

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.training.schedule import WarmupCosine


def rates(**options: Any) -> list[float]:
    schedule = WarmupCosine(learning_rate=2.0, **options)
    return [schedule.rate(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warmup_rises_in_equal_steps_to_the_peak(kind: str, warmup: int) -> None:
    found = rates(total_steps=20, warmup_steps=warmup, kind=kind)
    assert found[warmup] == 2.0
    rise = found[: warmup + 1]
    assert rise == pytest.approx([2.0 * (i + 1) / (warmup + 1) for i in range(warmup + 1)])
    assert max(found) == 2.0
    assert min(found) > 0


@pytest.mark.parametrize("warmup", [0, 5])
def test_decays_end_at_the_minimum_on_the_last_step(warmup: int) -> None:
    for kind in ("cosine", "linear"):
        found = rates(total_steps=25, warmup_steps=warmup, min_ratio=0.1, kind=kind)
        assert found[-1] == pytest.approx(0.2)
        decay = found[warmup:]
        assert all(a > b for a, b in pairwise(decay))
    assert set(rates(total_steps=25, warmup_steps=warmup, kind="constant")[warmup:]) == {2.0}


def test_shapes_against_their_formulas() -> None:
    cosine = rates(total_steps=11, min_ratio=0.0)
    assert cosine == pytest.approx([1 + math.cos(math.pi * i / 10) for i in range(11)])
    assert cosine[5] == pytest.approx(1.0)
    linear = rates(total_steps=11, min_ratio=0.5, kind="linear")
    assert linear == pytest.approx([2 - i / 10 for i in range(11)])


def test_later_steps_keep_the_last_rate() -> None:
    for kind in ("cosine", "linear", "constant"):
        schedule = WarmupCosine.from_dict({"learning_rate": 1.0, "total_steps": 9, "kind": kind})
        assert schedule.rate(100) == schedule.rate(8)


def test_a_single_step_is_at_the_peak() -> None:
    assert rates(total_steps=1) == [2.0]
    assert rates(total_steps=2, warmup_steps=1) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate=0\.0; it must be positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"min_ratio": 1.5}, r"min_ratio=1\.5; it must be in \[0, 1\]"),
        ({"warmup_steps": 10}, r"warmup_steps=10 of total_steps=10; .* less than total_steps"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"kind": "step"}, r"kind: found 'step' \(str\), expected one of 'cosine', 'linear'"),
    ],
)
def test_illegal_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WarmupCosine.from_dict({"learning_rate": 1.0, "total_steps": 10} | change)


def test_wsd_stays_at_the_peak_and_falls_in_a_line_at_the_end() -> None:
    found = rates(total_steps=20, warmup_steps=3, min_ratio=0.1, kind="wsd", decay_steps=5)
    assert found[:3] == pytest.approx([0.5, 1.0, 1.5])
    assert set(found[3:15]) == {2.0}
    assert found[15:] == pytest.approx([2.0 * (0.1 + 0.9 * i / 5) for i in (4, 3, 2, 1, 0)])
    fifth = rates(total_steps=20, kind="wsd")
    assert fifth == rates(total_steps=20, kind="wsd", decay_steps=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosine", "decay_steps": 3}, "decay_steps=3 of the kind 'cosine'; only 'wsd'"),
        ({"kind": "wsd", "decay_steps": 0}, "decay_steps=0 of total_steps=9; .* at least 1"),
        ({"kind": "wsd", "decay_steps": 10}, "decay_steps=10 of total_steps=9; .* at most"),
    ],
)
def test_decay_steps_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WarmupCosine(learning_rate=1.0, total_steps=9, **options)
