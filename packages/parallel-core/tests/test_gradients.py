"""Sums, norm and clipping of gradients; and that leaving any reduction out is noticed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

from fivefold.parallel_core import collectives, pipeline, tensor_parallel
from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.gradients import clip, global_norm, sum_partial
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable, Piece, Placement
from fivefold.parallel_core.styles import Replicate, Style
from fivefold.parallel_core.topology import Axis, Topology

from . import rig
from .rig import Case, Record, make_job, parallel_run, plain_run, worst
from .toy import ExpertParallel, ToyConfig

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


# ---- mutations -----------------------------------------------------------------------------
#
# Each takes one thing away that parallel training needs. The equality check that test_plan
# stands on must notice it, or that check proves nothing.

FOLDED = Case(
    degrees={"tp": 2, "cp": 2, "ep": 2, "etp": 2},
    config=ToyConfig(num_layers=1, num_experts=4),
    microbatch_size=2,
)
WHOLE = Case(degrees={"tp": 2}, config=ToyConfig(num_layers=1), sequence=False, microbatch_size=2)
STAGED = Case(degrees={"tp": 2, "pp": 2}, microbatch_size=2)

Mutation = Callable[[], AbstractContextManager[object]]


def replaced(owner: object, name: str, value: object) -> Mutation:
    """Put ``value`` at an attribute."""
    return lambda: patch.object(owner, name, value)


def backward_of(function: type, backward: Callable[..., object]) -> Mutation:
    """Give an autograd function another backward."""
    return replaced(function, "backward", staticmethod(backward))


def planned(**changes: Style) -> Mutation:
    """Change entries of the plan; ``__`` stands for a dot and ``layer`` for every layer."""
    entries = {
        name.replace("__", ".").replace("layer.", "layers.*."): style
        for name, style in changes.items()
    }
    real = rig.plan
    return replaced(rig, "plan", lambda *args, **kwargs: real(*args, **kwargs) | entries)


def nothing(*_: object) -> None:
    """Instead of a function that changes something in place."""


def untouched(x: Tensor, *_: object) -> Tensor:
    """Instead of a function that sums."""
    return x


def own_piece(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Instead of a reduce-scatter."""
    return collectives.piece_along(x, axis, dim).contiguous()


def own_rows(x: Tensor, sizes: list[int], axis: Axis) -> Tensor:
    """Instead of a reduce-scatter of rows."""
    return own_piece(x, axis, 0)


def repeated(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Instead of an all-gather."""
    return torch.cat([x] * axis.size, dim)


def doubled(set_factor: Callable[[FSDPModule, float], None]) -> Callable[[FSDPModule, float], None]:
    """Instead of FSDP's setter of its divisor."""
    return lambda module, factor: set_factor(module, 2 * factor)


def scaled_by_microbatches(name: str) -> Callable[..., object]:
    """Instead of torch's schedules."""
    real = schedules.get_schedule_class(name)
    return lambda *stages, **options: real(*stages, **{**options, "scale_grads": True})


ALONE = Axis("world", 1, 0, (0,))
KEPT = Replicate()  # of a seam: leave it as it is

MUTATIONS: dict[str, tuple[Case, Mutation]] = {
    "no sum over the tensor axis": (FOLDED, replaced(rig, "sum_partial", nothing)),
    "one norm said to be whole": (FOLDED, planned(layer__mlp_norm=Replicate(False))),
    "last norm said to be whole": (FOLDED, planned(norm=Replicate(False))),
    "FSDP divides by two": (
        FOLDED,
        replaced(
            FSDPModule,
            "set_gradient_divide_factor",
            doubled(FSDPModule.set_gradient_divide_factor),
        ),
    ),
    "FSDP averages": (FOLDED, replaced(FSDPModule, "set_gradient_divide_factor", nothing)),
    "copies counted in the norm": (FOLDED, replaced(Placement, "replicated", lambda self: ())),
    "norm of one rank": (FOLDED, replaced(Topology, "world", ALONE)),
    "experts over the dense data axes": (
        FOLDED,
        planned(layer__experts=ExpertParallel(data="dp-cp")),
    ),
    "experts not summed": (FOLDED, replaced(collectives, "scatter_sum_rows", own_rows)),
    "side losses not weighed": (FOLDED, replaced(ParallelModel, "weigh_side_losses", nothing)),
    "keys' gradients stay": (
        FOLDED,
        backward_of(
            collectives._AllGather, lambda ctx, g: (own_piece(g, ctx.axis, ctx.dim), None, None)
        ),
    ),
    "row-parallel gradients not gathered": (
        FOLDED,
        backward_of(
            collectives._ReduceScatter, lambda ctx, g: (repeated(g, ctx.axis, ctx.dim), None, None)
        ),
    ),
    "column-parallel input gradients not summed": (
        FOLDED,
        replaced(tensor_parallel, "scatter_sum_along", own_piece),
    ),
    "cross entropy of own ids": (FOLDED, replaced(tensor_parallel, "sum_over", untouched)),
    "positions start again": (FOLDED, planned(positions=KEPT)),
    "attention to own keys": (FOLDED, planned(layer__attention__core=KEPT)),
    "column-parallel input gradients not all-reduced": (
        WHOLE,
        backward_of(collectives._Copy, lambda ctx, g: (g, None)),
    ),
    "row-parallel outputs not summed": (
        WHOLE,
        replaced(tensor_parallel, "all_reduce", untouched),
    ),
    "a whole norm said to be partial": (WHOLE, planned(layer__mlp_norm=Replicate())),
    "the schedule scales too": (
        STAGED,
        replaced(pipeline, "schedules", SimpleNamespace(get_schedule_class=scaled_by_microbatches)),
    ),
}
CONTROLS = {"FOLDED": FOLDED, "WHOLE": WHOLE, "STAGED": STAGED}


def errors_on_a_rank(references: Mapping[str, Record]) -> dict[str, float]:
    """The largest error of one step, with each mutation and without."""
    found = {}
    for label, case in CONTROLS.items():
        topology = Topology(Layout(8, **case.degrees))  # type: ignore[arg-type]
        mutations = {name: m for name, (of, m) in MUTATIONS.items() if of is case}
        for name, mutation in {label: nullcontext, **mutations}.items():
            with mutation():
                job = make_job(case, topology)
                found[name], _ = worst(job, parallel_run(job, steps=1), references[label])
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error on any rank."""
    references = {label: plain_run(case.config, steps=1) for label, case in CONTROLS.items()}
    ranks = launch(errors_on_a_rank, 8, references, timeout=500)
    return {name: max(errors[name] for errors in ranks) for name in ranks[0]}


@pytest.mark.parametrize("label", CONTROLS)
def test_as_it_is_there_is_no_error(errors: dict[str, float], label: str) -> None:
    assert errors[label] < 1e-12


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_or_doubled_reduction_is_noticed(errors: dict[str, float], name: str) -> None:
    assert errors[name] > 1e-3
