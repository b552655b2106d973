"""The lazy shuffle: a bijection for every length and key, even, and the same for ever."""

import itertools

import numpy as np
import pytest

from fivefold.parallel_core.training.permutation import permute


@pytest.mark.parametrize("length", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 65536, 100_003])
def test_every_number_comes_once(length: int) -> None:
    order = permute(np.arange(length), length, 7, 3)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_points_are_computed_alone() -> None:
    whole = permute(np.arange(1000), 1000, 1, 2)
    some = np.array([999, 0, 512, 0])
    np.testing.assert_array_equal(permute(some, 1000, 1, 2), whole[some])
    assert permute(np.empty(0, np.int64), 1000, 1, 2).tolist() == []
    assert some.tolist() == [999, 0, 512, 0]


def test_keys_name_different_orders() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 12), (11, 2), (-1, 0), (2**100, 0)]
    orders = [tuple(permute(np.arange(1000), 1000, *key)) for key in keys]
    assert len(set(orders)) == len(keys)
    for one, other in itertools.pairwise(orders):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 15


def test_all_orders_of_a_few_are_about_equally_frequent() -> None:
    orders = [tuple(permute(np.arange(4), 4, seed)) for seed in range(4800)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert 100 < min(counts) <= max(counts) < 320


def test_neighbours_are_spread_evenly() -> None:
    length = 50_000
    order = permute(np.arange(length), length, 0, 0)
    # Each tenth of the positions holds about a tenth of each tenth of the numbers.
    table = np.histogram2d(np.arange(length), order, bins=10)[0]
    assert abs(table - length / 100).max() < 5 * (length / 100) ** 0.5
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / length - 1 / 3) < 0.01


def test_long_lengths_stay_exact() -> None:
    length = 2**45 + 7
    index = np.array([0, 1, 2**44, length - 1])
    order = permute(index, length, 5)
    assert len(set(order.tolist())) == 4
    assert 0 <= order.min() < order.max() < length


def test_order_never_changes() -> None:
    # A resumed run relies on these values: they may not change between releases.
    assert permute(np.arange(10), 10, 0, 0).tolist() == [4, 2, 1, 5, 8, 7, 6, 3, 9, 0]
    assert permute(np.arange(3), 10**12, 1, 2).tolist() == [
        434902415494,
        571307391931,
        525432010756,
    ]
