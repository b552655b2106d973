"""Ops that multiply matrices, within ``torch.autocast``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fivefold.kernels import attention, grouped_mm, linear_cross_entropy

OFFS = torch.tensor([1, 4], dtype=torch.int32)
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": lambda x, y: attention(x, y, y, torch.zeros(4, 4)),
    "grouped_mm": lambda x, y: grouped_mm(x[0], y.mT, offs=OFFS),
    "linear_cross_entropy": lambda x, y: linear_cross_entropy(x[0], y[1], torch.arange(4)),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_the_dtype_of_autocast(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 16).to(dtype).requires_grad_()
    y = torch.randn(2, 4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = OPS[name](x, y)
    expected = OPS[name](x.bfloat16(), y.bfloat16())
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    for gradient, source in zip(torch.autograd.grad(found.sum(), (x, y)), (x, y), strict=True):
        assert gradient.dtype == source.dtype


def test_float64_stays() -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, x, x).dtype == torch.float64


def test_float8_stays() -> None:
    x = torch.randn(4, 16).to(torch.float8_e4m3fn)
    one = torch.ones(())
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_mm(x, x[None].mT, offs=OFFS[1:], scale_a=one, scale_b=one)
    assert torch.equal(found, grouped_mm(x, x[None].mT, offs=OFFS[1:], scale_a=one, scale_b=one))
