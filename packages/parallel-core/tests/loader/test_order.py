"""Every sample once, the lowest that is ready first, none further from its place than is said."""

import random

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.loader import Order


def run(order: Order, rng: random.Random, most: int | None = None) -> list[int]:
    """Deliver under a random schedule of workers that finish, die, and of a consumer."""
    making: list[int] = []
    found: list[int] = []
    while not order.is_over and (most is None or len(found) < most):
        what = rng.choice(["begin", "begin", "done", "lost", "deliver"])
        if what == "begin" and (ordinal := order.begin()) is not None:
            making.append(ordinal)
        elif what == "deliver" and (ordinal := order.deliver()) is not None:
            found.append(ordinal)
        elif making and what in ("done", "lost"):
            # The first is slow, so that others overtake it.
            place = rng.randrange(len(making)) if rng.random() < 0.1 else len(making) - 1
            (order.done if what == "done" else order.lost)(making.pop(place))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_comes_once_and_within_the_window(seed: int) -> None:
    window = 1 + seed % 7
    order = Order(200, ahead=1 + seed % 5, window=window)
    found = run(order, random.Random(seed))
    assert sorted(found) == list(range(200))
    assert max(abs(place - ordinal) for place, ordinal in enumerate(found)) <= window - 1
    assert order.state_dict() == {"lowest": 200, "delivered": []}


@pytest.mark.parametrize("seed", range(5))
def test_the_rest_comes_after_resuming_anywhere(seed: int) -> None:
    rng = random.Random(seed)
    first = Order(100, ahead=8, window=20)
    before = run(first, rng, most=37)
    again = Order(100, ahead=3, window=9)
    again.load_state_dict(first.state_dict())
    assert sorted(before + run(again, rng)) == list(range(100))


@pytest.mark.parametrize("seed", range(5))
def test_in_order_is_the_order(seed: int) -> None:
    order = Order(60, ahead=6, window=6, in_order=True)
    assert run(order, random.Random(seed)) == list(range(60))


def test_a_slow_sample_is_overtaken_up_to_the_window() -> None:
    order = Order(None, ahead=2, window=4)
    assert [order.begin(), order.begin(), order.begin()] == [0, 1, None]  # ahead
    found = []
    for ordinal in (1, 2, 3):
        order.done(ordinal)
        found.append(order.deliver())
        following = order.begin()
        assert following == (ordinal + 1 if ordinal < 3 else None)  # the window
    assert found == [1, 2, 3] and order.lowest == 0
    order.done(0)
    assert order.deliver() == 0 and order.lowest == 4
    assert order.begin() == 4


def test_the_lowest_that_is_ready_comes_first() -> None:
    order = Order(9, ahead=4, window=9)
    for _ in range(4):
        order.begin()
    for ordinal in (3, 1, 2):
        order.done(ordinal)
    assert [order.deliver(), order.deliver(), order.deliver()] == [1, 2, 3]
    assert order.deliver() is None


def test_what_cannot_be_is_named() -> None:
    for values in ({"ahead": 0}, {"window": 0}, {"num_samples": -1}):
        with pytest.raises(ConfigError, match="at least 1"):
            Order(**{"num_samples": 3, "ahead": 1, "window": 1, **values})
    order = Order(3, ahead=1, window=1)
    for state in (
        {"lowest": 4, "delivered": []},
        {"lowest": 1, "delivered": [1]},
        {"lowest": 0, "delivered": [3]},
    ):
        with pytest.raises(ConfigError, match="is none of 3 samples"):
            order.load_state_dict(state)
    order.begin()
    with pytest.raises(ConfigError, match="before the first"):
        order.load_state_dict({"lowest": 1, "delivered": []})
