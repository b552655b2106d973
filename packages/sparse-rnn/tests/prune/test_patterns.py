"""Which values patterns keep."""

import pytest
import torch

from fivefold.sparse_rnn import SparseRNNInputError
from fivefold.sparse_rnn.prune import Balanced, Blocks, NofM, Unstructured


def test_unstructured_keeps_the_highest_of_all_together() -> None:
    small, large = torch.rand(7, 5) + 0.01, torch.rand(7, 5) + 2
    first, second = Unstructured().select([small, large], 0.6)
    assert int(first.sum() + second.sum()) == 42
    assert second.all()
    assert small[first].min() >= small[~first].max()


def test_no_score_is_never_kept() -> None:
    score = torch.zeros(4, 8)
    score[0, 0] = 1
    for pattern in (Unstructured(), Blocks(rows=2), Balanced(bank=4), NofM(n=2, m=4)):
        (mask,) = pattern.select([score], 0.9)
        assert bool(mask[0, 0]) and int(mask.sum()) <= 2


@pytest.mark.parametrize("shape", [(32, 6), (37, 6)])
def test_blocks_live_or_die_together(shape: tuple[int, int]) -> None:
    score = torch.rand(shape) + 0.1
    (mask,) = Blocks(rows=16).select([score], 0.5)
    for first in range(0, shape[0], 16):
        block = mask[first : first + 16]
        assert torch.equal(block.all(0), block.any(0))
    sums = torch.stack([score[i : i + 16].sum(0) for i in range(0, shape[0], 16)])
    kept = torch.stack([mask[i] for i in range(0, shape[0], 16)])
    assert sums[kept].min() >= sums[~kept].max()
    assert int(kept.sum()) == round(0.5 * kept.numel())


def test_blocks_above_a_threshold_have_one_value_above() -> None:
    score = torch.zeros(4, 4)
    score[2, 3] = 1
    mask = Blocks(rows=2, cols=2).above(score, 0.5)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 2:] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("density", "each"), [(0.1, 3), (0.3, 10), (0.0, 0), (1.0, 32)])
def test_balanced_keeps_equally_many_in_each_bank(density: float, each: int) -> None:
    score = torch.rand(9, 96) + 0.1
    (mask,) = Balanced().select([score], density)
    assert bool((mask.view(9, 3, 32).sum(-1) == each).all())
    if 0 < each < 32:
        banks, kept = score.view(9, 3, 32), mask.view(9, 3, 32)
        lowest = torch.where(kept, banks, 9).amin(-1)
        assert bool((lowest >= torch.where(kept, 0, banks).amax(-1)).all())


def test_the_last_bank_may_be_smaller() -> None:
    (mask,) = Balanced(bank=8).select([torch.rand(5, 20) + 0.1], 0.5)
    assert bool((mask[:, :8].sum(1) == 4).all()) and bool((mask[:, 16:].sum(1) == 2).all())


def test_n_of_m_comes_down_to_n() -> None:
    score = torch.rand(6, 16) + 0.1
    for density, each in ((1.0, 4), (0.7, 3), (0.5, 2), (0.1, 2)):
        (mask,) = NofM(n=2, m=4).select([score], density)
        assert bool((mask.view(6, 4, 4).sum(-1) == each).all())


@pytest.mark.parametrize("pattern", [Balanced(), NofM()])
def test_numbers_take_no_threshold(pattern: Balanced | NofM) -> None:
    with pytest.raises(SparseRNNInputError, match="takes no threshold"):
        pattern.above(torch.rand(2, 2), 0.5)


def test_mistakes_are_told() -> None:
    with pytest.raises(SparseRNNInputError, match="5:4; n must be from 0 to m"):
        NofM(n=5, m=4)
    with pytest.raises(SparseRNNInputError, match="blocks of 0x1"):
        Blocks(rows=0)
    with pytest.raises(SparseRNNInputError, match="banks of 0 columns"):
        Balanced(bank=0)
