"""Norms: one token and many are computed alike."""

import pytest
import torch

from fivefold.hybrid_ssm.blocks.mlp import MLP
from fivefold.hybrid_ssm.norm import GatedNorm, RMSNorm, is_small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_small_inputs_give_the_rows_of_large_ones(dtype: torch.dtype) -> None:
    y, z = torch.randn(2, 1, 1200, 64, dtype=dtype)
    plain, gated = RMSNorm(64, eps=1e-3).to(dtype), GatedNorm(64, 4, 1e-3).to(dtype)
    mlp = MLP(64, 32).to(dtype)
    for module in (plain, gated):
        module.weight.uniform_(0.5, 1.5)
    assert not is_small(y) and is_small(y[:, :1])
    atol = 1e-6 if dtype == torch.float32 else 1e-13
    for at in (0, 7):
        row = slice(at, at + 1)
        pairs = [
            (plain(y[:, row]), plain(y)[:, row]),
            (gated(y[:, row], z[:, row]), gated(y, z)[:, row]),
            (mlp(y[:, row]), mlp(y)[:, row]),
        ]
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_gradients_and_narrow_types_take_the_op() -> None:
    x = torch.randn(1, 1, 8)
    assert not is_small(x)
    with torch.no_grad():
        assert is_small(x)
        assert not is_small(x.bfloat16())
        assert not is_small(x.to("meta"))
