"""Linear layers in FP8: torchao's every bit, extreme values, and the same scales on two ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.fp8 import linears, scaling
from fivefold.hybrid_ssm.fp8.linears import FP8ColumnParallel, FP8Linear, FP8RowParallel, How
from fivefold.hybrid_ssm.fp8.scaling import E4M3, E5M2, Format
from fivefold.kernels import fp8_linear, fp8_quantize
from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.styles import ColumnParallel, RowParallel
from fivefold.parallel_core.topology import Topology


def fp8(module: nn.Module, kind: type[nn.Module], how: How) -> Any:
    module.__class__ = kind
    module.how = how  # type: ignore[assignment]
    return module


def torchao(linear: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    float8 = pytest.importorskip("torchao.float8.float8_linear")
    config = pytest.importorskip("torchao.float8.config")
    layer = float8.Float8Linear.from_float(linear, config.Float8LinearConfig(emulate=True))
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e30], ids=str)
def test_torchao_bit_for_bit(scale: float, bias: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 24) * scale).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, 40, dtype=dtype) * 1e-3
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype)
    copy = nn.Linear(24, 40, bias=bias, dtype=dtype)
    copy.load_state_dict(linear.state_dict())
    ours = fp8(linear, FP8Linear, How(None, Format()))
    y = ours(x)
    found = [y, *torch.autograd.grad(y, [x, *ours.parameters()], dy)]
    for mine, theirs in zip(found, torchao(copy, x, dy), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", [Format(), Format(E4M3, True)], ids=["e5m2", "e4m3 powers of 2"])
def test_what_ranks_compute_is_the_op_where_one_holds_all(form: Format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    weights = [torch.randn(size, 24, dtype=dtype, requires_grad=True) for size in (40, 8)]
    dys = [torch.randn(2, 5, size, dtype=dtype) for size in (40, 8)]
    found = linears._SplitLinears.apply(x, How(None, form), *weights)
    options = {"grad_dtype": form.grad_dtype, "power_of_2_scale": form.power_of_2}
    expected = [fp8_linear(x, weight, **options) for weight in weights]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    mine, theirs = (torch.autograd.grad(y, [x, *weights], dys) for y in (found, expected))
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(mine[0], theirs[0])


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-40, float("inf"), float("nan")], ids=str)
def test_scales_and_rounding_are_those_of_the_op_at_the_extremes(value: float) -> None:
    x = torch.randn(6, 8)
    for one in (x, torch.full_like(x, value)):
        one[2, 3] = value
        for dtype in (E4M3, E5M2):
            (amax,) = scaling.largest([one], None)
            scale = scaling.scale_of(amax, dtype, False)
            expected, theirs = fp8_quantize(one, dtype)
            torch.testing.assert_close(scale, theirs, rtol=0, atol=0, equal_nan=True)
            found = scaling.rounded(one, scale, dtype).float()
            torch.testing.assert_close(found, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_zeros_stay_zero_and_small_values_flush_beside_an_outlier() -> None:
    how = How(None, Format())
    linear = fp8(nn.Linear(4, 4, bias=False), FP8Linear, how)
    x = torch.zeros(2, 4, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4)) and torch.isfinite(linear.weight.grad).all()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        flushed = linear(torch.tensor([[1e9, 1.0, 2.0, -1e9]]))
        spread = linear(torch.tensor([[1e9, float("inf"), 2.0, 0.0]]))
    assert torch.equal(flushed[0, 1:3], torch.zeros(2)) and flushed[0, 0] == 1e9
    assert not torch.isfinite(spread).any()


# ---- two ranks -------------------------------------------------------------------------------


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
    how = How(axis, form, gather=sequence, x=sequence, weight=True, y=True)
    column = fp8(column, FP8ColumnParallel, how)
    row = fp8(row, FP8RowParallel, How(axis, form, x=True, weight=True))
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
    x, how = whole.requires_grad_(), How(None, Format())
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
