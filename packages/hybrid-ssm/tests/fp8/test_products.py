"""Linear layers in FP8 by this house's kernels: torchao's every bit, and extreme values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.fp8.products import PRODUCTS
from fivefold.kernels import fp8_linear, fp8_quantize
from fivefold.parallel_core.fp8 import linears, scaling
from fivefold.parallel_core.fp8.linears import FP8Linear, How
from fivefold.parallel_core.fp8.scaling import E4M3, E5M2, Format


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
    ours = fp8(linear, FP8Linear, How(None, Format(), PRODUCTS))
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
    found = linears._SplitLinears.apply(x, How(None, form, PRODUCTS), *weights)
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
    how = How(None, Format(), PRODUCTS)
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


def test_weights_come_in_the_dtype_of_the_input() -> None:
    """As autocast has it; the gradient is in the weight's own."""
    linear = nn.Linear(8, 4)
    narrow = nn.Linear(8, 4, dtype=torch.bfloat16)
    narrow.load_state_dict(linear.state_dict())
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    how = How(None, Format(), PRODUCTS)
    wide = fp8(linear, FP8Linear, how)
    y = wide(x)
    assert torch.equal(y, fp8(narrow, FP8Linear, how)(x))
    y.sum().backward()
    assert wide.weight.grad.dtype == torch.float32 and wide.bias.grad.dtype == torch.float32
