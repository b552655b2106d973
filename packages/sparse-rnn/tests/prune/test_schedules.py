"""Schedules by their formulas."""

import pytest

from fivefold.sparse_rnn import SparseRNNInputError
from fivefold.sparse_rnn.prune import Cubic, Narang, OneShot


def test_cubic_is_the_formula() -> None:
    cubic = Cubic(density=0.1, start=10, end=110, every=20)
    assert [step for step in range(200) if cubic.due(step)] == [10, 30, 50, 70, 90, 110]
    assert cubic.density_at(0) == cubic.density_at(10) == 1.0
    assert cubic.density_at(60) == pytest.approx(0.1 + 0.9 * 0.125)
    assert cubic.density_at(110) == cubic.density_at(500) == pytest.approx(0.1)
    uneven = Cubic(density=0.1, start=0, end=25, every=10)
    assert [step for step in range(40) if uneven.due(step)] == [0, 10, 20, 25]


def test_one_shot_is_once() -> None:
    shot = OneShot(density=0.2, at=3)
    assert [step for step in range(9) if shot.due(step)] == [3]
    assert shot.density_at(3) == 0.2


def test_narang_has_two_slopes_and_ends_where_it_should() -> None:
    narang = Narang(magnitude=0.5, start=100, ramp=200, end=500, every=100, steeper=2.0)
    slope = 0.5 / (100 + 2 * 300)
    assert narang.density_at(100) is None
    assert narang.threshold_at(100) == 0.0
    assert narang.threshold_at(150) == pytest.approx(50 * slope)
    assert narang.threshold_at(200) == pytest.approx(100 * slope)
    assert narang.threshold_at(201) == pytest.approx(102 * slope)
    assert narang.threshold_at(500) == narang.threshold_at(900) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(density=2.0, start=0, end=1), "density was asked to be 2.0"),
        (lambda: Cubic(density=0.1, start=5, end=1), "from step 5 to 1"),
        (lambda: Cubic(density=0.1, start=0, end=1, every=0), "every 0 steps"),
        (lambda: Narang(magnitude=1.0, start=5, ramp=2, end=9), "ramp is 2"),
        (lambda: Narang(magnitude=0.0, start=0, ramp=2, end=9), "magnitude 0.0"),
    ],
)
def test_mistakes_are_told(make: object, message: str) -> None:
    with pytest.raises(SparseRNNInputError, match=message):
        make()
