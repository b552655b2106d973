"""A tiny op, made of the public parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def double(x: Tensor, *, backend: str | None = None) -> Tensor:
    return x * 2


def _inputs(make: Maker) -> Inputs:
    return {"x": make.normal(4, 3)}


def samples(
    *peers: Peer, function: Callable[..., Any] = double, eager: Callable[..., Any] = double
) -> OpSamples:
    sample = Sample(name="4x3", inputs=_inputs)
    return OpSamples(
        name="double",
        function=function,
        eager=eager,
        small=(sample,),
        real=(sample,),
        laptop=(sample,),
        cost=lambda inputs: (Cost(bytes=1000), Cost(bytes=2000, flops=600)),
        peers=peers,
    )


def inputs() -> Inputs:
    return _inputs(Maker(dtype=torch.float32))
