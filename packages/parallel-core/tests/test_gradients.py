"""Sums, norm and clipping of gradients; that leaving one out is noticed is in test_mutations."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.gradients import clip, global_norm, sum_partial, sum_parts
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable, Piece, Placement
from fivefold.parallel_core.topology import Topology

# ---- one process ---------------------------------------------------------------------------


def pieces_with_gradients(*gradients: Tensor | None) -> list[Piece]:
    """Pieces of parameters called "0", "1", ... with these gradients."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in gradients])
    for parameter, gradient in zip(module, gradients, strict=True):
        parameter.grad = gradient
    return ParameterTable.of(module).pieces(module)


def test_the_norm_is_that_of_all_gradients_and_in_float64() -> None:
    pieces = pieces_with_gradients(torch.tensor([3.0, 0, 0]), None, torch.tensor([0, 4.0, 0]))
    norm = global_norm(pieces, Topology.local())
    assert norm.dtype == torch.float64
    assert norm.item() == 5.0
    assert global_norm(pieces_with_gradients(None), Topology.local()).item() == 0.0


@pytest.mark.parametrize(("limit", "factor"), [(10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_clipping_scales_down_and_never_up(limit: float, factor: float) -> None:
    gradients = [torch.tensor([3.0, 0, 0]), None, torch.tensor([0, 4.0, 0])]
    pieces = pieces_with_gradients(*gradients)
    clip(pieces, global_norm(pieces, Topology.local()), limit)
    assert pieces[0].grad is not None
    assert pieces[2].grad is not None
    assert pieces[0].grad.tolist() == pytest.approx([3 * factor, 0, 0])
    assert pieces[2].grad.tolist() == pytest.approx([0, 4 * factor, 0])
    assert pieces[1].grad is None


def test_clipping_without_gradients_does_nothing() -> None:
    clip(pieces_with_gradients(None), torch.tensor(5.0), 1.0)
    clip(pieces_with_gradients(torch.zeros(3)), torch.tensor(0.0), 1.0)


# ---- 4 ranks -------------------------------------------------------------------------------


@dataclass
class Summed:
    """What one rank's gradients are after ``sum_partial``, and what it sent."""

    gradients: dict[str, list[float] | None]
    calls: int


def sum_on_a_rank() -> Summed:
    topology = Topology(Layout(4, tp=2, cp=2))
    rank, tp = topology.world_rank, topology.rank("tp")
    rows: dict[str, tuple[tuple[str, ...], torch.dtype, float | None]] = {
        "partial": (("tp",), torch.float32, rank + 1.0),
        "missing_here": (("tp",), torch.float32, rank + 1.0 if tp == 0 else None),
        "wide": (("tp",), torch.float64, rank + 1.0),
        "twice": (("tp", "cp"), torch.float32, rank + 1.0),
        "whole": ((), torch.float32, rank + 1.0),
        "frozen": (("tp",), torch.float32, None),
    }
    module, table = nn.Module(), ParameterTable(topology)
    for name, (partial, dtype, value) in rows.items():
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=name != "frozen")
        parameter.grad = None if value is None else torch.full((2,), value, dtype=dtype)
        module.register_parameter(name, parameter)
        table.add(name, Placement(shape=(2,), partial=partial))
    pieces = table.pieces(module)
    with CommLedger(topology) as ledger:
        sum_partial(pieces, topology)
    return Summed(
        {piece.name: None if piece.grad is None else piece.grad.tolist() for piece in pieces},
        ledger["all_reduce", "tp"].calls,
    )


def test_gradients_are_summed_over_their_partial_axes_in_few_messages() -> None:
    found = launch(sum_on_a_rank, 4, timeout=300)
    for rank, summed in enumerate(found):
        both = 3.0 if rank < 2 else 7.0  # ranks 0 and 1, or 2 and 3
        first = 1.0 if rank < 2 else 3.0
        assert summed.gradients == {
            "partial": [both] * 2,
            "missing_here": [first] * 2,
            "wide": [both] * 2,
            "twice": [10.0] * 2,
            "whole": [rank + 1.0] * 2,
            "frozen": None,
        }
        assert summed.calls == 2, "one for each dtype"


def _sample() -> tuple[dict[str, Tensor], int]:
    topology = Topology(Layout(4, tp=2))
    table, rank = ParameterTable(topology), topology.rank("tp")
    table.add("whole", Placement(shape=(2,)))
    table.add("part", Placement(shape=(2,), partial=("tp",)))
    table.add("rounded", Placement(shape=(2,), partial=("tp",)))
    table.add("unused", Placement(shape=(2,), partial=("tp",)))
    gradients = {
        "whole": torch.full((2,), 5.0),
        "part": torch.tensor([1.0, 10.0 * rank]),
        # Their sum has no place in 16 bits.
        "rounded": torch.tensor([256.0, 1.0], dtype=torch.bfloat16)[rank].repeat(2),
    }
    with CommLedger(topology) as ledger:
        found = sum_parts(gradients, table)
    return found, ledger["all_reduce", "tp"].calls


def test_parts_of_a_sample_are_summed_where_the_table_says() -> None:
    for found, calls in launch(_sample, 4, timeout=60):
        assert {name: value.tolist() for name, value in found.items()} == {
            "whole": [5.0, 5.0],
            "part": [2.0, 10.0],
            "rounded": [257.0, 257.0],
        }
        assert found["rounded"].dtype == torch.float32 and calls == 1
