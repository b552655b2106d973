"""Linear layers in FP8: the same scales on two ranks as on one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.fp8 import linears, scaling
from fivefold.parallel_core.fp8.linears import FP8ColumnParallel, FP8RowParallel, How
from fivefold.parallel_core.fp8.scaling import Format
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.styles import ColumnParallel, RowParallel
from fivefold.parallel_core.topology import Topology

from .plain import PLAIN


def fp8(module: nn.Module, kind: type[nn.Module], how: How) -> Any:
    module.__class__ = kind
    module.how = how  # type: ignore[assignment]
    return module


class Recorder:
    """Scales in the order in which they are made."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.make: Callable[..., Tensor] = scaling.scale_of

    def __call__(self, *args: Any) -> Tensor:
        scale = self.make(*args)
        self.scales.append(float(scale))
        return scale


def mlp() -> tuple[LinearGroup, nn.Linear]:
    torch.manual_seed(1)
    up = LinearGroup({"a": nn.Linear(12, 16, bias=False), "b": nn.Linear(12, 8, bias=False)})
    return up.double(), nn.Linear(24, 12).double()


def values() -> tuple[Tensor, Tensor]:
    """The whole input, and the gradient of the whole result."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 2, 6, 12, generator=generator, dtype=torch.float64)
    return x * 1e-2, dy


def run(world: int, sequence: bool) -> dict[str, Any]:
    """Column- then row-parallel layers in FP8; whole tensors and all scales."""
    axis = Topology(Layout(world, tp=world)).axis("tp")
    table = ParameterTable(Topology(Layout(world, tp=world)))
    up, down = mlp()
    column = ColumnParallel(sequence=sequence).apply(up, "up", table)
    row = RowParallel(sequence=sequence).apply(down, "down", table)
    form = Format()
    how = How(axis, form, PLAIN, gather=sequence, x=sequence, weight=True, y=True)
    column = fp8(column, FP8ColumnParallel, how)
    row = fp8(row, FP8RowParallel, How(axis, form, PLAIN, x=True, weight=True))
    whole, weights = values()
    part = slice(None)
    if sequence and world > 1:
        part = slice(axis.rank * 3, axis.rank * 3 + 3)
    x = whole[:, part].clone().requires_grad_()
    recorder = Recorder()
    linears.scale_of = recorder  # type: ignore[attr-defined]
    try:
        y = row(torch.cat([each.square() for each in column(x)], -1))
        (y * weights[:, part]).sum().backward()
    finally:
        linears.scale_of = recorder.make  # type: ignore[attr-defined]
    assert x.grad is not None
    gather = (lambda t, dim: gather_along(t, axis, dim)) if sequence else (lambda t, dim: t)
    return {
        "scales": recorder.scales,
        "y": gather(y.detach(), 1),
        "dx": gather(x.grad, 1),
        "da": gather_along(column.get_parameter("a.weight").grad, axis, 0),
        "db": gather_along(column.get_parameter("b.weight").grad, axis, 0),
    }


def alone() -> dict[str, Any]:
    """The same on one rank through the code of ranks, so that its scales can be seen."""
    whole, weights = values()
    up, down = mlp()
    recorder = Recorder()
    linears.scale_of = recorder  # type: ignore[attr-defined]
    x, how = whole.requires_grad_(), How(None, Format(), PLAIN)
    try:
        # The order of features that two ranks have: a0 b0 a1 b1.
        a, b = linears._SplitLinears.apply(x, how, *(each.weight for each in up.children()))
        hidden = torch.cat([a[..., :8], b[..., :4], a[..., 8:], b[..., 4:]], -1).square()
        y = linears._SplitLinears.apply(hidden, how, down.weight)[0] + down.bias
        (y * weights).sum().backward()
    finally:
        linears.scale_of = recorder.make  # type: ignore[attr-defined]
    a, b = up.children()
    return {
        "scales": recorder.scales, "y": y.detach(), "dx": x.grad,
        "da": a.weight.grad, "db": b.weight.grad,
    }  # fmt: skip


@pytest.mark.parametrize("sequence", [True, False])
def test_two_ranks_have_the_scales_of_one_bit_for_bit(sequence: bool) -> None:
    expected = alone()
    for found in launch(run, 2, 2, sequence, timeout=60):
        assert found["scales"] == expected["scales"] and len(set(found["scales"])) == 8
        for key in ("y", "dx", "da", "db"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-14)
