"""The renamed collectives: values, async work, and silence about deprecated names."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core._compat import all_gather_single, reduce_scatter_single
from fivefold.parallel_core.launcher import launch


def _gather(async_op: bool) -> Tensor:
    mine = torch.full((2, 3), float(dist.get_rank()))
    output = torch.full((6, 3), torch.nan)
    work = all_gather_single(output, mine, async_op=async_op)
    assert (work is not None) == async_op
    if work is not None:
        work.wait()
    return output


def _scatter(async_op: bool) -> Tensor:
    parts = torch.arange(12.0).view(6, 2) * (dist.get_rank() + 1)
    output = torch.full((2, 2), torch.nan)
    work = reduce_scatter_single(output, parts, dist.group.WORLD, async_op)
    assert (work is not None) == async_op
    if work is not None:
        work.wait()
    return output


def _silently() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [_gather(True), _scatter(False)]


@pytest.mark.parametrize("async_op", [False, True])
def test_all_gather_puts_ranks_in_order(async_op: bool) -> None:
    expected = torch.tensor([0.0, 0, 1, 1, 2, 2]).unsqueeze(1).expand(6, 3)
    for output in launch(_gather, 3, async_op, timeout=60):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("async_op", [False, True])
def test_reduce_scatter_sums_and_splits(async_op: bool) -> None:
    expected = (torch.arange(12.0).view(6, 2) * (1 + 2 + 3)).chunk(3)
    for output, part in zip(launch(_scatter, 3, async_op, timeout=60), expected, strict=True):
        assert torch.equal(output, part)


def test_no_deprecation_warning() -> None:
    assert len(launch(_silently, 3, timeout=60)) == 3


def test_only_the_ranks_of_the_group_take_part() -> None:
    def pairs() -> Tensor:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        output = torch.empty(2)
        group = groups[dist.get_rank() // 2]
        all_gather_single(output, torch.tensor([float(dist.get_rank())]), group)
        return output

    results = launch(pairs, 4, timeout=60)
    assert [r.tolist() for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
