"""Every collective with autograd against its meaning in one process, on 4 ranks in float64.

The meaning is a function of all ranks' inputs to all ranks' outputs, in plain torch. The loss is
the sum over ranks of <output, weight>; where all ranks hold the same whole output (`invariant`)
there is one weight and one term. Every rank draws all inputs and weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core import collectives
from fivefold.parallel_core.collective_types import DECLARED
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.topology import Axis, Topology

RANKS = 4
ITEM = 8  # bytes of a float64

Meaning = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator with its arguments.

    Attributes:
        op: name in ``collectives`` and in ``DECLARED``.
        shapes: of each rank's input.
        args: of each rank beside input and axis.
        meaning: outputs of all ranks from the inputs of all ranks.
    """

    op: str
    name: str
    shapes: Sequence[tuple[int, ...]]
    args: Sequence[tuple[object, ...]]
    meaning: Meaning

    def apply(self, x: Tensor, axis: Axis) -> Tensor:
        args = self.args[axis.rank]
        function = getattr(collectives, self.op)
        if self.op in ("all_to_all", "all_gather_v", "reduce_scatter_v"):
            return function(x, *args, axis)
        return function(x, axis, *args)

    def inputs(self) -> list[Tensor]:
        """Every rank's input; one tensor for all where the input is invariant."""
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes]
        return [drawn[0]] * RANKS if DECLARED[self.op].source == "invariant" else drawn


def same(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [shape] * RANKS


def no_args() -> list[tuple[object, ...]]:
    return [()] * RANKS


def total(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def dim_cases(dim: int, shape: tuple[int, ...]) -> list[Case]:
    """The operators that work along a dim; ``shape`` is of one piece."""
    whole = list(shape)
    whole[dim] *= RANKS
    pieces = {"shapes": same(shape), "args": [(dim,)] * RANKS}
    wholes = {"shapes": same(tuple(whole)), "args": [(dim,)] * RANKS}

    def joined(xs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(xs), dim)] * RANKS

    def cut(x: Tensor) -> list[Tensor]:
        return list(x.split(x.shape[dim] // RANKS, dim)) if x.shape[dim] else [x] * RANKS

    name = f"dim {dim} of {shape}"
    return [
        Case(op="all_gather", name=name, meaning=joined, **pieces),
        Case(op="gather", name=name, meaning=joined, **pieces),
        Case(op="reduce_scatter", name=name, meaning=lambda xs: cut(total(xs)), **wholes),
        Case(op="split", name=name, meaning=lambda xs: cut(xs[0]), **wholes),
    ]


def row_cases(sizes: Sequence[int]) -> list[Case]:
    """The operators on unequal numbers of rows."""
    args: list[tuple[object, ...]] = [(list(sizes),)] * RANKS
    return [
        Case(
            op="all_gather_v",
            name=f"rows {sizes}",
            shapes=[(n, 3) for n in sizes],
            args=args,
            meaning=lambda xs: [torch.cat(list(xs))] * RANKS,
        ),
        Case(
            op="reduce_scatter_v",
            name=f"rows {sizes}",
            shapes=same((sum(sizes), 3)),
            args=args,
            meaning=lambda xs: list(total(xs).split(list(sizes))),
        ),
    ]


def exchange_case(sent: Sequence[Sequence[int]]) -> Case:
    """All-to-all where rank a sends ``sent[a][b]`` rows to rank b."""
    received = [list(column) for column in zip(*sent, strict=True)]

    def meaning(xs: Sequence[Tensor]) -> list[Tensor]:
        blocks = [x.split(list(row)) for x, row in zip(xs, sent, strict=True)]
        return [torch.cat([blocks[a][b] for a in range(RANKS)]) for b in range(RANKS)]

    return Case(
        op="all_to_all",
        name=f"rows {sent}",
        shapes=[(sum(row), 2) for row in sent],
        args=[(received[r], list(sent[r])) for r in range(RANKS)],
        meaning=meaning,
    )


CASES = [
    Case(
        op="copy",
        name="",
        shapes=same((3, 2)),
        args=no_args(),
        meaning=lambda xs: [xs[0]] * RANKS,
    ),
    Case(
        op="all_reduce",
        name="",
        shapes=same((3, 2)),
        args=no_args(),
        meaning=lambda xs: [total(xs)] * RANKS,
    ),
    *dim_cases(0, (2, 3)),
    *dim_cases(0, (0, 3)),
    *dim_cases(1, (2, 3, 2)),
    *dim_cases(-1, (3, 2, 1)),
    *row_cases((2, 2, 2, 2)),
    *row_cases((3, 0, 1, 2)),
    *row_cases((0, 0, 0, 5)),
    *row_cases((0, 0, 0, 0)),
    exchange_case([[1] * 4] * 4),
    exchange_case([[0, 2, 1, 0], [3, 0, 0, 1], [0, 0, 0, 0], [2, 0, 5, 1]]),
    exchange_case([[0] * 4] * 4),
]
IDS = [f"{case.op} {case.name}" for case in CASES]


@dataclass
class Result:
    """One rank's output and gradient, and the ledger's (calls, bytes) of each direction.

    Attributes:
        reads_only: input and output gradient are what they were before.
    """

    output: Tensor
    gradient: Tensor
    reads_only: bool
    forward: tuple[int, float]
    backward: tuple[int, float]


def weights(case: Case) -> list[Tensor]:
    """What each rank's output is multiplied with; one tensor for all where it is invariant."""
    generator = torch.Generator().manual_seed(4)
    shapes = [y.shape for y in case.meaning(case.inputs())]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [drawn[0]] * RANKS if DECLARED[case.op].result == "invariant" else drawn


def counted(ledger: CommLedger) -> tuple[int, float]:
    entries = list(ledger.entries.items())
    assert all(axis == "tp" for (_, axis), _ in entries), entries
    return sum(entry.calls for _, entry in entries), sum(entry.bytes for _, entry in entries)


def on_a_rank() -> list[Result]:
    topology = Topology(Layout(RANKS, tp=RANKS, ep=RANKS))
    axis = topology.axis("tp")
    results = []
    for case in CASES:
        # Strided, as activations often are.
        x = case.inputs()[axis.rank].mT.contiguous().mT.clone(memory_format=torch.preserve_format)
        x.requires_grad_()
        with CommLedger(topology) as forward:
            y = case.apply(x, axis)
        weight = weights(case)[axis.rank]
        with CommLedger(topology) as backward:
            (gradient,) = torch.autograd.grad(y, x, weight)
        reads_only = torch.equal(x, case.inputs()[axis.rank])
        reads_only &= torch.equal(weight, weights(case)[axis.rank])
        results.append(
            Result(y.detach(), gradient, reads_only, counted(forward), counted(backward))
        )
    return results


@pytest.fixture(scope="module")
def job() -> list[list[Result]]:
    """For every case what each rank got."""
    return [list(results) for results in zip(*launch(on_a_rank, RANKS, timeout=300), strict=True)]


def in_one_process(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all ranks, and the gradient of every rank's input."""
    leaves = [x.clone().requires_grad_() for x in case.inputs()]
    if DECLARED[case.op].source == "invariant":
        leaves = leaves[:1] * RANKS
    outputs = case.meaning(leaves)
    terms = [(y * w).sum() for y, w in zip(outputs, weights(case), strict=True)]
    if DECLARED[case.op].result == "invariant":
        terms = terms[:1]
    gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves)
    return [y.detach() for y in outputs], list(gradients)


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_values_and_gradients_are_those_of_one_process(job: list[list[Result]], index: int) -> None:
    outputs, gradients = in_one_process(CASES[index])
    for result, output, gradient in zip(job[index], outputs, gradients, strict=True):
        torch.testing.assert_close(result.output, output, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(result.gradient, gradient, rtol=1e-14, atol=1e-14)
        assert result.reads_only


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_backward_is_the_conjugate_of_forward(job: list[list[Result]], index: int) -> None:
    """<A x, w> = <x, At w>, each over all that the ranks hold together."""
    case = CASES[index]
    xs, ws, declared = case.inputs(), weights(case), DECLARED[case.op]
    left = [(r.output * w).sum() for r, w in zip(job[index], ws, strict=True)]
    right = [(x * r.gradient).sum() for r, x in zip(job[index], xs, strict=True)]
    left = left[:1] if declared.result == "invariant" else left
    right = right[:1] if declared.source == "invariant" else right
    torch.testing.assert_close(sum(left), sum(right), rtol=1e-13, atol=1e-13)


def variables(case: Case, rank: int, results: list[Result]) -> dict[str, float]:
    """What the formulas of ``DECLARED`` speak of, in bytes."""
    result, declared = results[rank], DECLARED[case.op]
    x = case.inputs()[rank]
    whole = max(x.numel(), result.output.numel()) * ITEM
    own = (x if declared.source == "shard" else result.output).numel() * ITEM
    found: dict[str, float] = {"t": RANKS, "n": whole, "own": own, "others": whole - own}
    if case.op == "all_to_all":
        received, sent = case.args[rank]
        row = x.shape[1] * ITEM
        found["sent"] = row * (sum(sent) - sent[rank])  # type: ignore[call-overload]
        found["received"] = row * (sum(received) - received[rank])  # type: ignore[call-overload]
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_declared_costs_are_what_was_sent(job: list[list[Result]], index: int) -> None:
    case, declared = CASES[index], DECLARED[CASES[index].op]
    for rank, result in enumerate(job[index]):
        known = variables(case, rank, job[index])
        for formula, (calls, sent) in (
            (declared.forward, result.forward),
            (declared.backward, result.backward),
        ):
            assert calls == (formula != "0"), (formula, calls)
            assert sent == pytest.approx(eval(formula, {}, known), rel=1e-15), (formula, rank)


def test_every_operator_that_is_declared_is_tested() -> None:
    assert {case.op for case in CASES} == set(DECLARED)


def test_gradients_have_the_type_that_is_conjugate_to_the_input() -> None:
    """Replicate and partial are each other's gradient, shard and invariant their own."""
    conjugate = {"replicate": "partial", "partial": "replicate"}
    pairs = {(d.source, d.result) for d in DECLARED.values()}
    for source, result in pairs:
        # The backward of an operator is an operator too, between the conjugate types.
        backward = (conjugate.get(result, result), conjugate.get(source, source))
        assert backward in pairs, (source, result)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_rank_sends_nothing_and_gives_its_input_back(case: Case) -> None:
    topology = Topology.local()
    x = torch.randn(4, 4, requires_grad=True)
    with CommLedger(topology) as ledger:
        assert case.apply(x, topology.axis("tp")) is x
    assert not ledger.entries


def test_plain_collectives_of_one_rank_give_their_input_back() -> None:
    axis, x = Topology.local().axis("tp"), torch.randn(4, 2)
    assert collectives.sum_over(x, axis) is x
    assert collectives.gather_along(x, axis, 1) is x
    assert collectives.scatter_sum_along(x, axis, 0) is x
