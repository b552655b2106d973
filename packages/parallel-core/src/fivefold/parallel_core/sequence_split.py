"""How context parallelism splits a sequence: which positions each rank holds.

- ``contiguous``: rank r holds the r-th of ``size`` equal pieces.
- ``zigzag``: of twice as many pieces, rank r holds the r-th and the r-th from the end. Under a
  causal mask a late query sees many keys and an early one few; a piece of each kind on every rank
  makes their work equal.
"""

from dataclasses import dataclass
from math import lcm
from typing import Literal, get_args

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError

Split = Literal["contiguous", "zigzag"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextConfig(Config):
    """How attention crosses a sequence that is split over "cp".

    Attributes:
        attention: "gather" collects all keys and values, "ring" passes them round, "heads"
            exchanges tokens for heads.
        split: how the sequence is split; see the module.
    """

    attention: Literal["gather", "ring", "heads"] = "gather"
    split: Split = "contiguous"


def num_pieces(split: Split) -> int:
    """Consecutive stretches of the sequence that a rank holds."""
    return 2 if split == "zigzag" else 1


def held(length: int, size: int, rank: int, split: Split = "contiguous") -> tuple[range, ...]:
    """Positions that a rank holds of a sequence, stretch by stretch, in the order it holds them.

    Args:
        length: of the whole sequence.
        size: ranks that split it.
        rank: this rank among them.
        split: see the module.

    Raises:
        ConfigError: the length does not divide, or no such split.

    >>> held(8, 2, 1)
    (range(4, 8),)
    >>> held(8, 2, 1, "zigzag")
    (range(2, 4), range(4, 6))
    """
    check_split(length, size, split)
    if split == "contiguous" or size == 1:
        piece = length // size
        return (range(rank * piece, (rank + 1) * piece),)
    piece = length // (2 * size)
    return tuple(range(i * piece, (i + 1) * piece) for i in (rank, 2 * size - 1 - rank))


def check_split(length: int, size: int, split: str) -> None:
    """Check that a sequence can be split.

    Raises:
        ConfigError: the length does not divide, or no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"a sequence is split {' or '.join(SPLITS)}; found {split!r}")
    pieces = size if split == "contiguous" or size == 1 else 2 * size
    if length % pieces:
        raise ConfigError(
            f"a sequence of {length} tokens cannot be split {split} over cp={size}: it needs a "
            f"multiple of {pieces}"
        )


def check_sequence(length: int, *, cp: int, tp: int = 1, split: str = "contiguous") -> None:
    """Check that every rank gets a whole number of a sequence's tokens.

    Args:
        length: tokens of a whole sequence.
        cp: ranks that split it for attention.
        tp: ranks that split it again between the layers; 1 without sequence parallelism.
        split: over "cp".

    Raises:
        ConfigError: it does not divide; with the nearest lengths that do.
    """
    check_split(0, cp, split)
    pieces = cp if split == "contiguous" or cp == 1 else 2 * cp
    multiple = lcm(pieces, cp * tp)
    if length < 1 or length % multiple:
        below = length // multiple * multiple
        near = " or ".join(str(n) for n in (below, below + multiple) if n > 0)
        raise ConfigError(
            f"sequence_length={length} cannot be split {split} over cp={cp}"
            f"{f' and, between the layers, over tp={tp}' if tp > 1 else ''}: it needs a multiple "
            f"of {multiple}, such as {near}"
        )
