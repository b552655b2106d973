"""Uneven shares: what comes, its gradients, what happens between, and what is sent."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.shares import (
    gather_shares,
    share_along,
    share_sizes,
    split_shares,
    start_gather,
    start_switch,
)
from fivefold.parallel_core.topology import Axis, Topology

# Both dims uneven, one shorter than there are ranks, both even.
SHAPES = [(7, 5), (2, 6), (3, 9)]
RANKS = 3


class Found(NamedTuple):
    """Of each way: what came, the gradient of this rank's part, and bytes by collective."""

    values: list[Tensor]
    gradients: list[Tensor]
    bytes: list[dict[str, float]]


def _whole(shape: tuple[int, int]) -> Tensor:
    return torch.arange(2 * shape[0] * shape[1] * 2, dtype=torch.float64).view(2, *shape, 2)


def _weights(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _ways(x: Tensor, shape: tuple[int, int], axis: Axis) -> list[tuple[Tensor, Tensor, bool]]:
    """Of each way its input, its output, and whether the output is the same on all ranks."""
    rows, columns = (share_along(x, axis, dim).clone().requires_grad_() for dim in (1, 2))
    whole = x.clone().requires_grad_()
    to_columns = start_switch(rows, axis, gather_dim=1, split_dim=-2, length=shape[0])
    to_rows = start_switch(columns, axis, gather_dim=2, split_dim=1, length=shape[1])
    gathered = start_gather(columns, axis, -2, shape[1])
    return [
        (rows, to_columns(), False),
        (columns, to_rows(), False),
        (columns, gathered(), False),
        (rows, gather_shares(rows, axis, 1, shape[0]), True),
        (whole, split_shares(whole, axis, 2), False),
    ]


def _exchanged(shape: tuple[int, int], topology: Topology) -> Found:
    axis = topology.axis("tp")
    found = Found([], [], [])
    for number, (source, result, alike) in enumerate(_ways(_whole(shape), shape, axis)):
        weights = _weights(result.shape, 0 if alike else axis.rank)
        with CommLedger(topology) as ledger:
            (gradient,) = torch.autograd.grad((result * weights).sum(), source, retain_graph=True)
        found.values.append(result.detach())
        found.gradients.append(gradient)
        found.bytes.append({name: entry.bytes for (name, _), entry in ledger.entries.items()})
        assert number < 5 and {axis for _, axis in ledger.entries} <= {"tp"}
    return found


def _all() -> list[Found]:
    topology = Topology(Layout(RANKS, tp=RANKS))
    return [_exchanged(shape, topology) for shape in SHAPES]


@pytest.fixture(scope="module")
def found() -> list[list[Found]]:
    return launch(_all, RANKS, timeout=300)


def _axis(rank: int) -> Axis:
    return Axis("tp", RANKS, rank, tuple(range(RANKS)))


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_shares_are_those_of_the_whole(found: list[list[Found]], case: int) -> None:
    x = _whole(SHAPES[case])
    for rank, of_rank in enumerate(found):
        rows, columns = (share_along(x, _axis(rank), dim) for dim in (1, 2))
        for value, expected in zip(
            of_rank[case].values, (columns, rows, x, x, columns), strict=True
        ):
            assert value.is_contiguous() or value.dim() == 4
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_gradients_go_back_the_way_they_came(found: list[list[Found]], case: int) -> None:
    x = _whole(SHAPES[case])
    results = [[value.shape for value in of_rank[case].values] for of_rank in found]
    drawn = [[_weights(shape, rank) for shape in results[rank]] for rank in range(RANKS)]
    to_columns, to_rows = (
        torch.cat([drawn[rank][way] for rank in range(RANKS)], dim) for way, dim in ((0, 2), (1, 1))
    )
    summed = sum(drawn[rank][2] for rank in range(RANKS))
    for rank, of_rank in enumerate(found):
        axis = _axis(rank)
        expected = [
            share_along(to_columns, axis, 1),
            share_along(to_rows, axis, 2),
            share_along(summed, axis, 2),
            share_along(_weights(x.shape, 0), axis, 1),
            torch.cat([drawn[other][4] for other in range(RANKS)], 2),
        ]
        for gradient, value in zip(of_rank[case].gradients, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_what_is_sent_is_what_the_shares_say(found: list[list[Found]], case: int) -> None:
    (num_rows, num_columns), nbytes = SHAPES[case], 2 * 2 * 8
    rows, columns = (share_sizes(length, RANKS) for length in SHAPES[case])
    for rank, of_rank in enumerate(found):
        # Back: the switch sends its columns' other rows, a gather all it has padded.
        switch = columns[rank] * (num_rows - rows[rank]) * nbytes
        back = rows[rank] * (num_columns - columns[rank]) * nbytes
        gather = (RANKS - 1) * columns[0] * num_rows * nbytes
        assert of_rank[case].bytes == [
            {"all_to_all": switch},
            {"all_to_all": back},
            {"reduce_scatter": gather},
            {},
            {"all_gather": gather},
        ]


class _Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, notes: list[str]) -> Tensor:
        ctx.name, ctx.notes = name, notes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.notes.append(ctx.name)
        return grads[0].clone(), None, None


def _order() -> list[str]:
    axis, notes = Topology(Layout(2, tp=2)).axis("tp"), []
    x = torch.ones(1, 4, requires_grad=True)
    wait = start_switch(
        _Noting.apply(x, "before", notes), axis, gather_dim=0, split_dim=1, length=2
    )
    between = _Noting.apply(x, "between", notes)
    (_Noting.apply(wait(), "after", notes).sum() + between.sum()).backward()
    return notes


def test_backward_does_between_what_forward_did_between() -> None:
    assert launch(_order, 2, timeout=60) == [["after", "between", "before"]] * 2


def test_sizes_differ_by_one_at_most() -> None:
    for length in range(12):
        for num_ranks in range(1, 6):
            sizes = share_sizes(length, num_ranks)
            assert sum(sizes) == length and len(sizes) == num_ranks
            assert all(a in (b, b + 1) for a, b in pairwise(sizes)) and sizes[0] - sizes[-1] <= 1


def test_one_rank_sends_nothing() -> None:
    x, axis = torch.ones(2, 3), Topology.local().axis("tp")
    assert start_switch(x, axis, gather_dim=0, split_dim=1, length=2)() is x
    assert start_gather(x, axis, 0, 2)() is x
    assert split_shares(x, axis, 0) is x and gather_shares(x, axis, 0, 2) is x
