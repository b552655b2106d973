"""Which checkpoints stay."""

import pytest

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.retention import Retention

STEPS = [10, 20, 30, 40, 50, 60]
LOSSES = {10: 3.0, 20: 1.0, 40: 2.0, 50: 2.0}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {50, 60}),
        (Retention(last=1), {60}),
        (Retention(last=9), set(STEPS)),
        (Retention(last=1, every=20), {20, 40, 60}),
        (Retention(last=1, every=30), {30, 60}),
        (Retention(last=1, best=1), {20, 60}),
        (Retention(last=1, best=2), {20, 40, 60}),
        (Retention(last=1, best=9), {10, 20, 40, 50, 60}),
        (Retention(last=1, every=50, best=1), {20, 50, 60}),
    ],
)
def test_kept(retention: Retention, kept: set[int]) -> None:
    assert retention.keeps(STEPS, LOSSES.get) == kept
    assert 60 in kept, "the newest whole one always stays"


def test_nothing_is_kept_of_nothing() -> None:
    assert Retention(every=1, best=1).keeps([], LOSSES.get) == set()


@pytest.mark.parametrize(("name", "value"), [("last", 0), ("every", 0), ("best", -1)])
def test_numbers_that_cannot_be(name: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"={value} "):
        Retention(**{name: value})
