"""An all-to-all in two halves: what comes, its gradients, and what happens between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.collectives import all_to_all
from fivefold.parallel_core.exchange import start_all_to_all
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.topology import Topology

# Rows from each rank (row) to each rank (column); one rank gets none, one sends none.
ROWS = [[1, 0, 2, 3], [0, 0, 0, 0], [4, 0, 1, 1], [2, 0, 0, 1]]


class _Noting(torch.autograd.Function):
    """Identity that writes down when its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, notes: list[str]) -> Tensor:
        ctx.name, ctx.notes = name, notes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.notes.append(ctx.name)
        return grads[0].clone(), None, None


def _exchanged(halves: bool, topology: Topology) -> tuple[Tensor, Tensor, list[str], float]:
    axis = topology.axis("ep")
    sent, received = ROWS[axis.rank], [row[axis.rank] for row in ROWS]
    torch.manual_seed(axis.rank)
    x = torch.randn(sum(sent), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(received), 3, dtype=torch.float64)
    notes: list[str] = []
    with CommLedger(topology) as ledger:
        before = _Noting.apply(x, "before", notes)
        wait: Callable[[], Tensor]
        if halves:
            wait = start_all_to_all(before, received, sent, axis)
        else:
            found = all_to_all(before, received, sent, axis)
            wait = lambda: found  # noqa: E731
        between = _Noting.apply(x, "between", notes)
        y = _Noting.apply(wait(), "after", notes)
        ((y * weights).sum() + between.square().sum()).backward()
    return y.detach(), x.grad, notes, ledger["all_to_all", "ep"].bytes


def _both() -> list[tuple[Tensor, Tensor, list[str], float]]:
    topology = Topology(Layout(4, ep=4))
    return [_exchanged(halves, topology) for halves in (True, False)]


@pytest.fixture(scope="module")
def found() -> list[list[tuple[Tensor, Tensor, list[str], float]]]:
    return launch(_both, 4, timeout=300)


def test_rows_and_gradients_are_those_of_the_whole(found: list[Any]) -> None:
    for rank, (halves, whole) in enumerate(found):
        assert len(halves[0]) == sum(row[rank] for row in ROWS)
        torch.testing.assert_close(halves[0], whole[0], rtol=0, atol=0)
        torch.testing.assert_close(halves[1], whole[1], rtol=0, atol=0)


def test_backward_does_between_what_forward_did_between(found: list[Any]) -> None:
    for halves, _ in found:
        assert halves[2] == ["after", "between", "before"]


def test_as_much_is_counted(found: list[Any]) -> None:
    for rank, (halves, whole) in enumerate(found):
        away = (
            sum(ROWS[rank]) - ROWS[rank][rank] + sum(row[rank] for row in ROWS) - ROWS[rank][rank]
        )
        assert halves[3] == whole[3] == away * 3 * 8


def test_one_rank_keeps_its_rows() -> None:
    x = torch.ones(2, 3)
    assert start_all_to_all(x, [2], [2], Topology.local().axis("ep"))() is x


def _waits_twice() -> str:
    axis = Topology(Layout(2, ep=2)).axis("ep")
    wait = start_all_to_all(torch.ones(2, 1), [1, 1], [1, 1], axis)
    wait()
    with pytest.raises(RuntimeError) as error:
        wait()
    return str(error.value)


def test_waiting_twice_is_an_error() -> None:
    assert launch(_waits_twice, 2, timeout=60)[0].endswith("waited for again")
