"""That the suite notices a reduction left out, a divisor doubled, a gathered tensor kept.

Each mutation takes one thing away that parallel training needs. The equality check that test_plan
and test_forms stand on must notice it, or that check proves nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

from fivefold.parallel_core import (
    collectives,
    fsdp,
    gradients,
    pipeline,
    replicas,
    tensor_parallel,
)
from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable, Piece, Placement
from fivefold.parallel_core.pipeline import keep_stage
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.replicas import Replicas
from fivefold.parallel_core.styles import Replicate, SplitContext, Style
from fivefold.parallel_core.tied import Twin
from fivefold.parallel_core.topology import PP_ENDS, Axis, Topology

from . import rig
from .rig import Case, Record, fresh_topology, make_job, parallel_run, plain_run, worst
from .toy import HEAD, TAIL, ExpertParallel, Toy, ToyConfig, plan

# ---- what changes numbers ----------------------------------------------------------------------

FOLDED = Case(
    degrees={"tp": 2, "cp": 2, "ep": 2, "etp": 2},
    config=ToyConfig(num_layers=1, num_experts=4),
    microbatch_size=2,
)
WHOLE = Case(degrees={"tp": 2}, config=ToyConfig(num_layers=1), sequence=False, microbatch_size=2)
STAGED = Case(degrees={"tp": 2, "pp": 2}, microbatch_size=2)
EXCHANGED = Case(
    degrees={"cp": 4},
    config=ToyConfig(num_layers=1),
    changes={"layers.*.attention.core": SplitContext("heads")},
    microbatch_size=2,
)
TIED = Case(degrees={"tp": 4, "pp": 2}, config=ToyConfig(tied=True, num_key_heads=2))
TWIN = Case(
    degrees={"pp": 2},
    config=ToyConfig(num_layers=4, tied=True),
    schedule="ZBVZeroBubble",
    stages_per_rank=2,
)


def in_copies(form: str, **values: object) -> Case:
    """Dense and expert parameters in two copies of two shards."""
    data = DataParallelConfig(form=form, shard_size=2, expert_shard_size=2, **values)  # type: ignore[arg-type]
    config = ToyConfig(num_layers=1, num_experts=4)
    return Case(degrees={"tp": 2, "ep": 2}, config=config, data=data)


WHOLE_COPIES = in_copies("zero1")
SHARDED_COPIES = in_copies("zero3")
REPLICATED = Case(
    degrees={"tp": 2},
    config=ToyConfig(num_layers=1),
    data=DataParallelConfig(form="replicate"),
)

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


def nothing(*_: object, **__: object) -> None:
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


def without(axis: str) -> Mutation:
    """Leave out the sums over one axis of what the table calls partial."""
    real = gradients._sum_together

    def sum_others(grads: list[Tensor], over: Axis) -> None:
        if over.name != axis:
            real(grads, over)

    return replaced(gradients, "_sum_together", sum_others)


def twice(x: Tensor, axis: Axis) -> Tensor:
    """Instead of FSDP's sum over copies: as if each gradient were counted twice."""
    return START_SUM(x, axis)().mul_(2)


def start_twice(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """The same where the sum is begun."""
    return lambda: twice(x, axis)


def start_nothing(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Instead of a sum that is begun."""
    return lambda: x


def start_own(rows: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Instead of a reduce-scatter that is begun."""
    return lambda: rows[axis.rank]


START_SUM = replicas.start_sum


def first_gather_only(gather: Callable[[Replicas], None]) -> Callable[[Replicas], None]:
    """Instead of gathering before every step."""

    def once(of: Replicas) -> None:
        if not hasattr(of, "has_gathered"):
            of.has_gathered = True  # type: ignore[attr-defined]
            gather(of)

    return once


def own_rows_sent(x: Tensor, output_splits: Sequence[int], *_: object) -> Tensor:
    """Instead of an exchange of rows: what stays is taken for what comes."""
    return x[: sum(output_splits)].clone()


def own_piece_into(output: Tensor, input: Tensor, group: Any, async_op: bool = False) -> None:
    """Instead of FSDP's reduce-scatter."""
    output.copy_(input.chunk(group.size())[group.rank()])


def own_into_all(output: Tensor, input: Tensor, group: Any, async_op: bool = False) -> None:
    """Instead of FSDP's all-gather."""
    output.view(group.size(), -1).copy_(input.flatten().clone())


def counted_at_both_ends() -> Mutation:
    """Let the last stage count its end of a tied parameter too."""
    real = ParameterTable._piece

    def piece(table: ParameterTable, name: str, local: str, parameter: nn.Parameter) -> Piece:
        found = real(table, name, local, parameter)
        return replace(found, counted=table._is_counted(found.placement))

    return replaced(ParameterTable, "_piece", piece)


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
MUTATIONS |= {
    "tokens not exchanged for heads": (
        EXCHANGED,
        replaced(collectives, "exchange_rows", own_rows_sent),
    ),
    "gradients of exchanged tokens stay": (
        EXCHANGED,
        backward_of(collectives._AllToAll, lambda ctx, g: (g, None, None, None)),
    ),
    "key heads that neighbours hold not summed": (TIED, without("tp%2")),
    "the ends of a tied embedding not summed": (TIED, without(PP_ENDS)),
    "both ends of a tied embedding counted": (TIED, counted_at_both_ends()),
    "a twin keeps its gradient": (TWIN, replaced(Twin, "hand_over", nothing)),
    "a twin keeps its values": (TWIN, replaced(Twin, "refresh", nothing)),
    "shards of the gradient not summed": (
        WHOLE_COPIES,
        replaced(replicas, "start_scatter_sum", start_own),
    ),
    "copies of a shard not summed": (
        WHOLE_COPIES,
        replaced(replicas, "start_sum", start_nothing),
    ),
    "copies of a shard summed twice": (
        WHOLE_COPIES,
        replaced(replicas, "start_sum", start_twice),
    ),
    "other ranks' shards not gathered": (
        WHOLE_COPIES,
        replaced(replicas, "gather_along", repeated),
    ),
    "shards gathered before the first step only": (
        WHOLE_COPIES,
        replaced(Replicas, "gather", first_gather_only(Replicas.gather)),
    ),
    "gradients not reduced": (WHOLE_COPIES, replaced(pipeline, "reduce_gradients", nothing)),
    "copies of a shard counted in the norm": (
        WHOLE_COPIES,
        replaced(ParameterTable, "set_copies", nothing),
    ),
    "experts' shards over the dense ranks": (
        WHOLE_COPIES,
        planned(layer__experts=ExpertParallel(data="dp-cp")),
    ),
    "FSDP's copies not summed": (SHARDED_COPIES, replaced(fsdp, "sum_copies", nothing)),
    "FSDP's copies summed twice": (SHARDED_COPIES, replaced(fsdp, "sum_copies", twice)),
    "FSDP's copies counted in the norm": (
        SHARDED_COPIES,
        replaced(ParameterTable, "set_copies", nothing),
    ),
    "FSDP's shards not summed": (
        SHARDED_COPIES,
        replaced(fsdp, "reduce_scatter_single", own_piece_into),
    ),
    "FSDP's shards not gathered": (
        SHARDED_COPIES,
        replaced(fsdp, "all_gather_single", own_into_all),
    ),
    "replicas not summed": (REPLICATED, replaced(replicas, "start_sum", start_nothing)),
    "replicas summed twice": (REPLICATED, replaced(replicas, "start_sum", start_twice)),
    "replicas counted in the norm": (REPLICATED, replaced(ParameterTable, "set_copies", nothing)),
}
CONTROLS = {
    "FOLDED": FOLDED,
    "WHOLE": WHOLE,
    "STAGED": STAGED,
    "EXCHANGED": EXCHANGED,
    "TIED": TIED,
    "TWIN": TWIN,
    "WHOLE_COPIES": WHOLE_COPIES,
    "SHARDED_COPIES": SHARDED_COPIES,
    "REPLICATED": REPLICATED,
}
STEPS = {"TWIN": 2, "WHOLE_COPIES": 2}
"""Where one step cannot show that the next one begins with stale values; elsewhere 1."""


def errors_on_a_rank(references: Mapping[str, Record]) -> dict[str, float]:
    """The largest error of the first steps, with each mutation and without."""
    found = {}
    for label, case in CONTROLS.items():
        topology = fresh_topology(case.degrees)
        mutations = {name: m for name, (of, m) in MUTATIONS.items() if of is case}
        for name, mutation in {label: nullcontext, **mutations}.items():
            with mutation():
                job = make_job(case, topology)
                found[name], _ = worst(
                    job, parallel_run(job, steps=STEPS.get(label, 1)), references[label]
                )
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error on any rank."""
    references = {label: plain_run(c.config, STEPS.get(label, 1)) for label, c in CONTROLS.items()}
    ranks = launch(errors_on_a_rank, 8, references, timeout=500)
    return {name: max(errors[name] for errors in ranks) for name in ranks[0]}


@pytest.mark.parametrize("label", CONTROLS)
def test_as_it_is_there_is_no_error(errors: dict[str, float], label: str) -> None:
    assert errors[label] < 1e-12


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_or_doubled_reduction_is_noticed(errors: dict[str, float], name: str) -> None:
    assert errors[name] > 1e-3


# ---- what is kept --------------------------------------------------------------------------
#
# These change no number of the training, only bytes: what test_activations, test_plan,
# test_data_parallel and test_replicas compare with formulas must change with them.


class KeepsGathered(tensor_parallel._GatheredLinears):
    """Keeps the gathered input for backward, as a layer without the paper's care does."""

    @staticmethod
    def forward(
        ctx: Any, x_bsh: Tensor, axis: Axis, count: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        whole = collectives.gather_along(x_bsh, axis, 1)
        ctx.save_for_backward(whole, *parameters[:count])
        ctx.axis, ctx.with_bias = axis, len(parameters) > count
        biases = parameters[count:] or [None] * count
        return tuple(
            F.linear(whole, weight, bias)
            for weight, bias in zip(parameters[:count], biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        flat = [grad.flatten(0, 1) for grad in grads]
        grad_whole = sum(g @ w for g, w in zip(flat, weights, strict=True))
        grad_x = own_piece(grad_whole.view(*grads[0].shape[:2], -1), ctx.axis, 1)  # type: ignore[union-attr]
        grad_weights = [grad.t().mm(whole.flatten(0, 1)) for grad in flat]
        grad_biases = [grad.sum(0) for grad in flat] if ctx.with_bias else []
        return grad_x, None, None, *grad_weights, *grad_biases


def layer_bytes() -> dict[str, object]:
    """What autograd keeps of a layer under sequence parallelism, and what the layer sends."""
    topology, config = Topology(Layout(2, tp=2)), ToyConfig(num_layers=3)
    model = keep_stage(Toy(config).double(), 1, 3, head=HEAD, tail=TAIL)
    parallelize(model, topology, plan(config))
    x = torch.ones(2, 8, 12, dtype=torch.float64, requires_grad=True)
    with ActivationLedger(model) as kept, CommLedger(topology) as sent:
        out = model(x).sum()
        live = kept.live
        out.backward()
    return {"kept": live, "gathers": sent["all_gather", "tp"].calls}


def form_bytes(form: str) -> dict[str, object]:
    """What a rank keeps after a step's last reduction, and what it gathered."""
    data = DataParallelConfig(form=form)  # type: ignore[arg-type]
    job = make_job(Case(degrees={}, config=ToyConfig(num_layers=1), data=data))
    with CommLedger(job.topology) as sent:
        job.runner.train(*job.data(), 1.0)
    parameters = list(job.model.parts[0].parameters())
    return {
        "gradients": sum(p.grad.numel() for p in parameters if p.grad is not None),
        "updated": sum(piece.local.numel() for piece in job.pieces),
        "gathers": sent["all_gather", "dp-cp"].calls,
        "reductions": sent["reduce_scatter", "dp-cp"].calls,
    }


def kept_gradient(of: Replicas, name: str) -> Tensor | None:
    """Instead of taking a gradient away from its parameter."""
    return of._model.get_parameter(name).grad


def kept_parameters(module: nn.Module, **options: Any) -> FSDPModule:
    """Instead of FSDP that frees gathered parameters after forward."""
    return FULLY_SHARD(module, **{**options, "reshard_after_forward": False})


FULLY_SHARD = fsdp.fully_shard
KEEPING: dict[str, tuple[Callable[[], dict[str, object]], Mutation]] = {
    "a layer's gathered input": (
        layer_bytes,
        replaced(tensor_parallel, "_GatheredLinears", KeepsGathered),
    ),
    "ZeRO-1's whole gradients": (
        partial(form_bytes, "zero1"),
        replaced(Replicas, "_take", kept_gradient),
    ),
    "ZeRO-1's whole state": (
        partial(form_bytes, "zero1"),
        replaced(DataParallelConfig, "shard_size_of", lambda *_: 1),
    ),
    "ZeRO-3's gathered parameters": (
        partial(form_bytes, "zero3"),
        replaced(fsdp, "fully_shard", kept_parameters),
    ),
    "every microbatch's own reduction": (
        partial(form_bytes, "zero2"),
        replaced(pipeline, "synchronise_last", nothing),
    ),
}


@pytest.fixture(scope="module")
def kept() -> list[dict[str, tuple[dict[str, object], dict[str, object]]]]:
    """Of each rank: for every mutation what is measured without and with it."""

    def on_a_rank() -> dict[str, tuple[dict[str, object], dict[str, object]]]:
        found = {}
        for name, (measure, mutation) in KEEPING.items():
            before = measure()
            with mutation():
                found[name] = before, measure()
        return found

    return launch(on_a_rank, 2, timeout=300)


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_kept_is_noticed(
    kept: list[dict[str, tuple[dict[str, object], dict[str, object]]]], name: str
) -> None:
    for rank in kept:
        without_it, with_it = rank[name]
        assert without_it != with_it
