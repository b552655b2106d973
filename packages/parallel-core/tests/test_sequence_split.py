"""Splits of a sequence."""

from itertools import product

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.sequence_split import SPLITS, check_sequence, held, num_pieces


@pytest.mark.parametrize(("split", "size"), [*product(SPLITS, (1, 2, 3, 4, 8))])
def test_every_position_once_and_equally_many(split: str, size: int) -> None:
    ranks = [held(48, size, rank, split) for rank in range(size)]
    assert sorted(p for stretches in ranks for at in stretches for p in at) == list(range(48))
    assert {sum(map(len, stretches)) for stretches in ranks} == {48 // size}
    assert {len(stretches) for stretches in ranks} == {num_pieces(split) if size > 1 else 1}


def test_zigzag_sums_to_the_same_work() -> None:
    work = [sum(p + 1 for at in held(32, 4, rank, "zigzag") for p in at) for rank in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize(
    ("length", "size", "split", "message"),
    [
        (10, 4, "contiguous", r"10 tokens cannot be split contiguous over cp=4: .* multiple of 4"),
        (12, 4, "zigzag", r"12 tokens cannot be split zigzag over cp=4: .* multiple of 8"),
        (8, 2, "spiral", r"contiguous or zigzag; found 'spiral'"),
    ],
)
def test_what_does_not_divide_is_said(length: int, size: int, split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        held(length, size, 0, split)


@pytest.mark.parametrize(
    ("length", "sizes", "multiple", "near"),
    [
        (10, {"cp": 4}, 4, "8 or 12"),
        (12, {"cp": 4, "split": "zigzag"}, 8, "8 or 16"),
        (8, {"cp": 2, "tp": 3}, 6, "6 or 12"),
        (12, {"cp": 2, "tp": 3, "split": "zigzag"}, 12, None),
        (6, {"cp": 2, "tp": 3, "split": "zigzag"}, 12, "12$"),
        (3, {"cp": 1, "tp": 2}, 2, "2 or 4"),
        (3, {"cp": 1, "split": "zigzag"}, 1, None),
        (0, {"cp": 2}, 2, "2$"),
    ],
)
def test_a_sequence_must_divide_over_all_that_split_it(
    length: int, sizes: dict, multiple: int, near: str | None
) -> None:
    if near is None:
        check_sequence(length, **sizes)
    else:
        message = rf"sequence_length={length} cannot .* multiple of {multiple}, such as {near}"
        with pytest.raises(ConfigError, match=message):
            check_sequence(length, **sizes)
