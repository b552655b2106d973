"""Calls of ``relu2``: odd ones for tests, those of models for machine code and benchmarks."""

import torch
from torch import Tensor

from fivefold.kernels.ops.relu2 import relu2
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample


def _of(*shape: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {"input": make.normal(*shape)}

    return Sample(name="x".join(map(str, shape)) or "scalar", inputs=inputs)


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads x and writes y; backward reads dy too and writes dx."""
    x = inputs["input"]
    size = x.numel() * x.element_size()
    return Cost(bytes=2 * size), Cost(bytes=3 * size)


def _eager(input: Tensor) -> Tensor:
    """What a user of torch alone writes."""
    return torch.relu(input).square()


SAMPLES = OpSamples(
    name="relu2",
    function=relu2,
    small=(_of(3, 5, 7), _of(2, 1030), _of(4, 6), _of(1), _of(), _of(0, 3)),
    real=(_of(4096, 21504), _of(8192, 12288)),
    laptop=(_of(512, 5376),),
    cost=cost,
    eager=_eager,
)
