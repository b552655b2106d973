"""Calls of ``fp8_linear``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.fp8_linear import fp8_linear
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _call(
    *shape: int, width: int, bias: bool = False, gradients: tuple[bool, bool] = (True, True),
    **options: Any,
) -> Sample:  # fmt: skip
    def inputs(make: Maker) -> Inputs:
        inner = shape[-1]
        given: Inputs = {
            "input": make.normal(*shape, grad=gradients[0]),
            "weight": make.normal(width, inner, scale=inner**-0.5, grad=gradients[1]),
        }
        if bias:
            given["bias"] = make.normal(width)
        return given | options

    named = "".join(f" {name}" for name in options) + " bias" * bias
    return Sample(name=f"{'x'.join(map(str, shape))} to {width}{named}", inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """One product forward and two backward; operands are read in their own dtype."""
    x, weight = inputs["input"], inputs["weight"]
    outputs = x.numel() // x.shape[-1] * weight.shape[0]
    forward = Cost(
        bytes=(x.numel() + weight.numel() + outputs) * x.element_size(),
        flops=2 * x.numel() * weight.shape[0],
    )
    # The kept float8 values and the result's gradient are read, both gradients are written.
    moved = (x.numel() + weight.numel()) * (1 + x.element_size()) + outputs * x.element_size()
    return forward, Cost(bytes=moved, flops=2 * forward.flops)


def _eager(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """What it is faster than: a product in the operands' own dtype."""
    return F.linear(input, weight, bias)


def _torchao(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    converted = Float8Linear.from_float(layer, Float8LinearConfig())
    y: Tensor = torch.func.functional_call(converted, {"weight": weight}, (input,))
    return y if bias is None else y + bias


SAMPLES = OpSamples(
    name="fp8_linear",
    function=fp8_linear,
    small=(
        _call(5, 7, 24, width=21, bias=True),
        _call(33, 17, width=35, power_of_2_scale=True),
        _call(3, 16, width=4, grad_dtype=torch.float8_e4m3fn),
        _call(2, 5, width=3, gradients=(True, False)),
        _call(2, 5, width=3, gradients=(False, True)),
        _call(0, 4, width=3),
        _call(1, width=1),
    ),
    real=(_call(8192, 4096, width=14336), _call(8192, 14336, width=4096)),
    laptop=(_call(256, 512, width=512),),
    cost=cost,
    eager=_eager,
    peers=(Peer(name="torchao", function=_torchao),),
    dtypes=(torch.float32, torch.bfloat16),
    tensor_cores=True,
    rounds_to=torch.float8_e5m2,
)
