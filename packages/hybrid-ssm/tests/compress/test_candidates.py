"""The grid beside a brute-force listing, and budgets that nobody meets."""

from itertools import combinations

import pytest
import torch

from fivefold.hybrid_ssm import HybridConfig
from fivefold.hybrid_ssm.compress.candidates import grid_of, list_candidates, points
from fivefold.hybrid_ssm.compress.config import MemoryConfig, SearchConfig
from fivefold.hybrid_ssm.compress.memory import memory_of
from fivefold.hybrid_ssm.compress.prune import Candidate, pruned_config
from fivefold.hybrid_ssm.errors import HybridConfigError

from ..released import RELEASED
from .conftest import SIZES

H_47B, H_56B = (HybridConfig.from_hf(RELEASED[f"Nemotron-H-{size}"][0]) for size in ("47B", "56B"))
PARENT = HybridConfig(**(SIZES | {"pattern": "M-M*-E*"}))
SCORES = torch.tensor([5.0, 1.0, 2.0, 7.0, 3.0, 4.0, 6.0])
MEMORY = MemoryConfig(context_length=64)


def test_the_listing_is_that_of_brute_force() -> None:
    """All subsets of layers whose every kept one beats every left one of its kind."""
    search = SearchConfig(
        attention=(0, 1, 2), mamba=(1, 2), mlp=(0, 1, 2), moe=(0, 1), widths=(8, 24), experts=(2, 4)
    )
    budget = 0.7 * memory_of(PARENT, MEMORY).total
    expected = set()
    for size in range(1, 8):
        for kept in combinations(range(7), size):
            left = set(range(7)) - set(kept)
            pairs = [(i, j) for i in kept for j in left if PARENT.pattern[i] == PARENT.pattern[j]]
            kinds = [PARENT.pattern[i] for i in kept]
            if any(SCORES[i] < SCORES[j] for i, j in pairs) or "M" not in kinds:
                continue
            for width in (8, 24):
                for experts in (2, 4):
                    one = Candidate(layers=kept, width=width, experts=experts, mamba_heads=4)
                    if memory_of(pruned_config(PARENT, one), MEMORY).total <= budget:
                        key = (kept, width if "-" in kinds else 0, experts if "E" in kinds else 0)
                        expected.add(key)
    found = list_candidates(PARENT, SCORES, grid_of(PARENT, search), MEMORY, budget)
    keys = []
    for each in found:
        one, kinds = each.candidate, {PARENT.pattern[i] for i in each.candidate.layers}
        keys.append((one.layers, one.width * ("-" in kinds), one.experts * ("E" in kinds)))
        assert each.memory == memory_of(pruned_config(PARENT, one), MEMORY)
    assert len(keys) == len(set(keys)) > 20 and set(keys) == expected
    totals = [each.memory.total for each in found]
    assert totals == sorted(totals, reverse=True) and max(totals) <= budget


def test_a_share_of_the_budget_bounds_from_below() -> None:
    grid = grid_of(PARENT, SearchConfig(widths=(8, 16, 24)))
    budget = 0.8 * memory_of(PARENT, MEMORY).total
    every = list_candidates(PARENT, SCORES, grid, MEMORY, budget)
    large = list_candidates(PARENT, SCORES, grid, MEMORY, budget, 0.9)
    assert large == [each for each in every if each.memory.total >= 0.9 * budget] != every


def test_a_grid_of_defaults() -> None:
    grid = grid_of(H_56B, SearchConfig())
    assert grid.counts["*"] == (5, 6, 7, 8, 9, 10)
    assert grid.counts["M"] == (29, 34, 39, 44, 49, 54) and len(grid.counts["-"]) == 6
    assert grid.widths == tuple(range(24576, 32769, 1024))
    assert (grid.experts, grid.mamba_heads) == ((0,), (256,)) and "E" not in grid.counts
    assert grid.size == 6 * 6 * 6 * 9


def test_the_child_of_the_paper_is_a_candidate_of_its_parent() -> None:
    """Counts 5/45/48 and width 30720 are in the grid that says so, and fit 31.7 GiB."""
    search = SearchConfig(attention=(5, 10), mamba=(45, 54), mlp=(48, 54), widths=(30720,))
    scores = torch.arange(118.0)
    found = list_candidates(
        H_56B, scores, grid_of(H_56B, search), MemoryConfig(), 31.7 * 2**30, 0.9
    )
    child = memory_of(H_47B, MemoryConfig())
    assert child.total in [each.memory.total for each in found]
    assert all(each.candidate.width == 30720 for each in found)


def test_a_budget_that_nobody_meets() -> None:
    grid = grid_of(PARENT, SearchConfig())
    least = min(
        memory_of(pruned_config(PARENT, one), MEMORY).total for one in points(PARENT, SCORES, grid)
    )
    with pytest.raises(HybridConfigError, match=r"none of the \d+ candidates .* smallest needs"):
        list_candidates(PARENT, SCORES, grid, MEMORY, least - 1)
    assert len(list_candidates(PARENT, SCORES, grid, MEMORY, least)) == 1
    with pytest.raises(HybridConfigError, match=r"none between .*least_use=0\.9.* lower least_use"):
        list_candidates(PARENT, SCORES, grid, MEMORY, 1e12, 0.9)


def test_values_that_the_parent_does_not_have() -> None:
    for search, text in (
        (
            SearchConfig(mamba=(3,)),
            r"search\.mamba has 3; the parent has 2 'M' layers: from 0 to 2",
        ),
        (
            SearchConfig(widths=(25,)),
            r"search\.widths has 25; .* 24 in its '-' layers: from 1 to 24",
        ),
    ):
        with pytest.raises(HybridConfigError, match=text):
            grid_of(PARENT, search)
