"""Parameters that stay in float32."""

from typing import Any

import torch
from torch import nn

from fivefold.hybrid_ssm.precision import KeepsFloat32


class Pair(KeepsFloat32):
    wide = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.full((2,), 1 + 2**-20))
        self.other = nn.Parameter(torch.ones(2))
        self.below = nn.Linear(2, 2)


def dtypes(module: nn.Module) -> dict[str, Any]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


def test_a_narrow_model_keeps_them() -> None:
    pair = Pair().to(torch.bfloat16)
    assert dtypes(pair) == {
        "kept": torch.float32,
        "other": torch.bfloat16,
        "below.weight": torch.bfloat16,
        "below.bias": torch.bfloat16,
    }
    assert float(pair.kept[0].detach()) == 1 + 2**-20
    assert set(dtypes(pair.half()).values()) == {torch.float32, torch.float16}


def test_a_wide_model_widens_them_and_comes_back() -> None:
    pair = Pair().double()
    assert set(dtypes(pair).values()) == {torch.float64}
    assert set(dtypes(pair.float()).values()) == {torch.float32}
    assert Pair().to("meta").kept.is_meta
