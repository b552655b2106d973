"""Calls of ``conv_update``: odd ones for tests, those of models for benchmarks.

Legend: B batch, K channels, W taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.conv_update import conv_update
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample


def _call(
    batch: int, num_channels: int, taps: int, *, bias: bool = True, silu: bool = True
) -> Sample:
    # Without gradients, which go through causal_conv1d.
    def inputs(make: Maker) -> Inputs:
        return {
            "state": make.normal(batch, taps - 1, num_channels, grad=False),
            "x": make.normal(batch, num_channels, grad=False),
            "weight": make.normal(num_channels, taps, grad=False),
            "bias": make.normal(num_channels, grad=False) if bias else None,
            "activation": "silu" if silu else None,
        }

    options = "" if bias else " no bias"
    return Sample(name=f"{batch}x{num_channels}, {taps} taps{options}", inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Reads and writes the state, reads x and the weight and writes y."""
    state, x, weight = inputs["state"], inputs["x"], inputs["weight"]
    values = 2 * state.numel() + 2 * x.numel() + weight.numel()
    return Cost(bytes=values * x.element_size()), Cost(bytes=0)


def _eager(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    inputs = torch.cat([state, x.unsqueeze(1)], 1)
    y = (inputs * weight.mT).sum(1)
    y = y if bias is None else y + bias
    return F.silu(y) if options["activation"] else y, inputs[:, 1:].clone()


SAMPLES = OpSamples(
    name="conv_update",
    function=conv_update,
    eager=_eager,
    small=(
        _call(3, 37, 4),
        _call(2, 5, 3, silu=False),
        _call(1, 530, 2, bias=False),
        _call(2, 18, 1),
        _call(0, 8, 4),
    ),
    real=(_call(1, 10240, 4), _call(128, 10240, 4)),
    laptop=(_call(1, 6144, 4), _call(64, 6144, 4)),
    cost=cost,
)
