"""Which values may be kept together.

A pattern selects from scores, one tensor (R, H) for each part of the model that shares a budget:
all matrices together, each matrix, or each gate.

Legend: R rows, H columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fivefold.parallel_core.config import Config
from fivefold.sparse_rnn.errors import SparseRNNInputError


class Pattern(Protocol):
    """What a pruner asks."""

    def select(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """Masks of the values of highest score, about so large a share of all of them."""

    def above(self, score: Tensor, threshold: float) -> Tensor:
        """The mask of what has a score above a threshold."""

    def survivors(self, score: Tensor, density: float) -> Tensor:
        """The mask of what stays when others are to take the place of the rest."""

    def density_of(self, mask: Tensor) -> float:
        """The density with which ``select`` keeps as many as a mask does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unstructured(Config):
    """Any value by itself."""

    def select(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The ``round(density * values)`` highest of all scores together."""
        return _highest(scores, density)

    def above(self, score: Tensor, threshold: float) -> Tensor:
        """Each value by itself."""
        return score > threshold

    def survivors(self, score: Tensor, density: float) -> Tensor:
        """As ``select``."""
        return self.select([score], density)[0]

    def density_of(self, mask: Tensor) -> float:
        """The share that is true."""
        return _share(mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks(Config):
    """Rectangles of values live or die together; 16×1 is a register of rows on a CPU.

    Attributes:
        rows: of a block.
        cols: of a block.
    """

    rows: int = 16
    cols: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise SparseRNNInputError(f"blocks of {self.rows}x{self.cols}; both must be at least 1")

    def select(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The blocks of highest sum; those at an edge may be smaller and count for less."""
        masks = _highest([self._sums(score) for score in scores], density)
        return [self._spread(mask, score) for mask, score in zip(masks, scores, strict=True)]

    def above(self, score: Tensor, threshold: float) -> Tensor:
        """Blocks whose largest value is above, as in Narang et al., arXiv 1711.02782."""
        return self._spread(self._padded(score).amax((1, 3)) > threshold, score)

    def survivors(self, score: Tensor, density: float) -> Tensor:
        """As ``select``: whole blocks."""
        return self.select([score], density)[0]

    def density_of(self, mask: Tensor) -> float:
        """The share of blocks, of which those at an edge are smaller."""
        return _share(self._padded(mask.float()).amax((1, 3)) > 0)

    def _sums(self, score: Tensor) -> Tensor:
        return self._padded(score).sum((1, 3))

    def _padded(self, score: Tensor) -> Tensor:
        rows, cols = score.shape
        pad = (0, -cols % self.cols, 0, -rows % self.rows)
        padded = torch.nn.functional.pad(score, pad)
        return padded.reshape(-(-rows // self.rows), self.rows, -1, self.cols)

    def _spread(self, mask: Tensor, score: Tensor) -> Tensor:
        spread = mask.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return spread[: score.shape[0], : score.shape[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Balanced(Config):
    """Equally many in every bank of a row: Cao et al., FPGA 2019.

    Every row then takes equally long, and no lane waits for another.

    Attributes:
        bank: columns of a bank; the last of a row may be smaller and keeps the same share.
    """

    bank: int = 32

    def __post_init__(self) -> None:
        if self.bank < 1:
            raise SparseRNNInputError(f"banks of {self.bank} columns; it must be at least 1")

    def select(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The ``round(density * bank)`` highest of each bank: densities go in such steps."""
        return [_in_banks(score, self.bank, round(density * self.bank)) for score in scores]

    def above(self, score: Tensor, threshold: float) -> Tensor:
        """Not with a threshold, under which banks would differ."""
        raise _no_threshold("bank-balanced")

    def survivors(self, score: Tensor, density: float) -> Tensor:
        """The highest wherever they are: what leaves a bank makes room in it."""
        return _highest([score], density)[0]

    def density_of(self, mask: Tensor) -> float:
        """The share that is true."""
        return _share(mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class NofM(Config):
    """At most n of every m neighbours in a row, such as 2:4.

    Attributes:
        n: kept in the end; until a schedule comes to that, more.
        m: neighbours.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.n <= self.m or self.m < 1:
            raise SparseRNNInputError(f"{self.n}:{self.m}; n must be from 0 to m, m at least 1")

    def select(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The highest of every m, no fewer than n while the schedule asks for more."""
        keep = max(self.n, math.ceil(density * self.m - 1e-9))
        return [_in_banks(score, self.m, keep) for score in scores]

    def above(self, score: Tensor, threshold: float) -> Tensor:
        """Not with a threshold, under which groups would differ."""
        raise _no_threshold(f"{self.n}:{self.m}")

    def survivors(self, score: Tensor, density: float) -> Tensor:
        """The highest wherever they are: what leaves a bank makes room in it."""
        return _highest([score], density)[0]

    def density_of(self, mask: Tensor) -> float:
        """The share that is true."""
        return _share(mask)


def _highest(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(round(density * flat.numel())).indices] = True
    # What has no score at all is not kept: it is zero already, or forbidden.
    mask &= flat > 0
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _share(mask: Tensor) -> float:
    return float(mask.sum()) / max(mask.numel(), 1)


def _in_banks(score: Tensor, bank: int, keep: int) -> Tensor:
    rows, cols = score.shape
    mask = torch.zeros_like(score, dtype=torch.bool)
    whole = cols // bank * bank
    for first, last in ((0, whole), (whole, cols)):
        width = bank if first == 0 and whole else last - first
        if last == first:
            continue
        kept = keep if width == bank else round(keep * width / bank)
        part = score[:, first:last].reshape(rows, -1, width)
        chosen = torch.zeros_like(part, dtype=torch.bool)
        chosen.scatter_(-1, part.topk(min(kept, width), -1).indices, True)
        mask[:, first:last] = (chosen & (part > 0)).reshape(rows, last - first)
    return mask


def _no_threshold(name: str) -> SparseRNNInputError:
    return SparseRNNInputError(
        f"a {name} pattern keeps a number of values and takes no threshold: use the cubic or "
        "one-shot schedule"
    )
