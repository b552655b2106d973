"""Calls of ``swiglu``: odd ones for tests, those of models for machine code and benchmarks."""

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.ops.swiglu import swiglu
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _two(*shape: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {"gate": make.normal(*shape), "up": make.normal(*shape)}

    return Sample(name=_name(shape), inputs=inputs)


def _packed(*shape: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {"gate": make.normal(*shape[:-1], 2 * shape[-1])}

    return Sample(name=f"{_name(shape)} packed", inputs=inputs)


def _halves(*shape: int) -> Sample:
    def inputs(make: Maker) -> Inputs:
        gate, up = make.normal(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
        return {"gate": gate, "up": up}

    return Sample(name=f"{_name(shape)} halves", inputs=inputs)


def _scaled(*shape: int, packed: bool = False) -> Sample:
    def inputs(make: Maker) -> Inputs:
        pair = (_packed if packed else _two)(*shape).inputs(make)
        return {**pair, "row_scale": make.normal(*shape[:-1])}

    return Sample(name=f"{_name(shape)}{' packed' * packed} scaled", inputs=inputs)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads gate and up and writes y; backward reads dy too and writes both gradients."""
    gate, up = inputs["gate"], inputs.get("up")
    half = gate.numel() * gate.element_size() // (2 if up is None else 1)
    scale = inputs.get("row_scale")
    rows = 0 if scale is None else prod(scale.shape) * scale.element_size()
    return Cost(bytes=3 * half + rows), Cost(bytes=5 * half + 2 * rows)


def _eager(gate: Tensor, up: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """What a user of torch alone writes."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    y = F.silu(gate) * up
    return y if row_scale is None else y * row_scale.unsqueeze(-1)


def _liger(gate: Tensor, up: Tensor, **_: Any) -> Tensor:
    # Its backward pass overwrites gate and up.
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def _of_two(inputs: Inputs) -> bool:
    return inputs.get("up") is not None and inputs.get("row_scale") is None


SAMPLES = OpSamples(
    name="swiglu",
    function=swiglu,
    small=(
        _two(3, 5, 7),
        _packed(3, 5, 7),
        _scaled(18, 6),
        _scaled(5, 17, packed=True),
        _halves(2, 3, 4),
        _two(3, 515),
        _scaled(2, 515),
        _packed(3),
        _two(0, 8),
        _scaled(4, 0, packed=True),
    ),
    real=(_two(4096, 14336), _packed(16384, 1408), _scaled(16384, 1408, packed=True)),
    laptop=(_two(512, 2816), _packed(512, 2816), _scaled(512, 1408, packed=True)),
    cost=cost,
    eager=_eager,
    peers=(Peer(name="liger", function=_liger, takes=_of_two),),
)
