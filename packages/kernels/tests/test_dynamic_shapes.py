"""``torch.compile`` with sizes that are symbols, beside tensors whose sizes are numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fivefold.kernels import (
    attention,
    cross_entropy,
    fp8_linear,
    fp8_quantize,
    grouped_mm,
    layer_norm,
    linear_cross_entropy,
    relu2,
    rms_norm,
    rotary,
    swiglu,
)


def _ones(*shape: int) -> Tensor:
    # Made while compiling: what comes from outside has sizes that are symbols too.
    return torch.ones(shape)


def _table() -> Tensor:
    return torch.linspace(0, 1, 6 * 8).reshape(6, 8)


def _target() -> Tensor:
    return torch.arange(6)


def _offs() -> Tensor:
    return torch.tensor([2, 2, 6], dtype=torch.int32)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, (16,), _ones(16), gate=x, group_size=4),
    "layer_norm": lambda x: layer_norm(x, (16,), _ones(16), _ones(16)),
    "cross_entropy": lambda x: cross_entropy(x, _target(), _ones(16)),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, x.detach(), _target()),
    "attention": lambda x: attention(
        x[None], x[None], x[None], _table()[:, :1], key_mask=_target() > 1, is_causal=True
    ),
    "rotary": lambda x: rotary(x[:, None], _table().cos(), _table().sin()),
    "swiglu": lambda x: swiglu(x, row_scale=_ones(6)),
    "relu2": relu2,
    "grouped_mm": lambda x: grouped_mm(x, x.expand(3, -1, -1).mT, offs=_offs()),
    "grouped_mm float8": lambda x: (
        grouped_mm(
            fp8_quantize(x.detach())[0],
            fp8_quantize(x.detach().repeat(3, 1, 1))[0].mT,
            offs=_offs(),
            scale_a=_ones(6),
            scale_b=_ones(3),
        )
        * x[0, 0]
    ),
    "fp8_linear": lambda x: fp8_linear(x, x.detach(), _ones(6)),
}


@pytest.mark.parametrize("name", OPS)
def test_sizes_that_are_symbols(name: str) -> None:
    torch.compiler.reset()
    x = torch.randn(6, 16, requires_grad=True)
    compiled = torch.compile(OPS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = compiled(x), OPS[name](x)
    assert torch.equal(found, expected)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.equal(*slopes)
