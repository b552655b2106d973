"""Calls of ``linear``: odd ones for tests, those of models for benchmarks."""

import torch
import torch.nn.functional as F

from fivefold.kernels.ops.linear import linear
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample


def _call(*shape: int, width: int, bias: bool = False, transposed: bool = False) -> Sample:
    def inputs(make: Maker) -> Inputs:
        inner = shape[-1]
        of_weight = (inner, width) if transposed else (width, inner)
        weight = make.normal(*of_weight, scale=max(inner, 1) ** -0.5)
        given: Inputs = {
            "input": make.normal(*shape),
            "weight": weight.t() if transposed else weight,
        }
        return given | ({"bias": make.normal(width)} if bias else {})

    named = " transposed" * transposed + " bias" * bias
    return Sample(name=f"{'x'.join(map(str, shape))} to {width}{named}", inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """One product forward and two backward."""
    x, weight = inputs["input"], inputs["weight"]
    outputs = x.numel() // x.shape[-1] * weight.shape[0]
    size = x.element_size()
    forward = Cost(
        bytes=(x.numel() + weight.numel() + outputs) * size, flops=2 * x.numel() * weight.shape[0]
    )
    return forward, Cost(bytes=2 * forward.bytes, flops=2 * forward.flops)


SAMPLES = OpSamples(
    name="linear",
    function=linear,
    small=(
        _call(3, 5, 7, width=9, bias=True),
        _call(33, 17, width=35),
        _call(18, 24, width=16, bias=True, transposed=True),
        _call(9, 1, width=1),
        _call(0, 4, width=3, bias=True),
        _call(4, 0, width=3),
        _call(6, width=5),
    ),
    real=(_call(8192, 4096, width=14336), _call(8192, 14336, width=4096)),
    laptop=(_call(2048, 512, width=2048), _call(256, 1024, width=1024), _call(1, 1024, width=4096)),
    cost=cost,
    eager=F.linear,
    dtypes=(torch.float32, torch.bfloat16),
)
