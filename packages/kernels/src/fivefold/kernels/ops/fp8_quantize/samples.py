"""Calls of ``fp8_quantize``: odd ones for tests, those of models for the rest."""

import torch
from torch import Tensor

from fivefold.kernels.ops.fp8_quantize import fp8_quantize
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _call(
    *shape: int, dtype: torch.dtype = E4M3, power_of_2: bool = False, scale: float = 1.0
) -> Sample:
    def inputs(make: Maker) -> Inputs:
        x = make.normal(*shape, scale=scale, grad=False)
        return {"x": x, "dtype": dtype, "power_of_2_scale": power_of_2}

    kind = "e4m3" if dtype is E4M3 else "e5m2"
    rounded = " power of two" if power_of_2 else ""
    return Sample(name=f"{'x'.join(map(str, shape))} {kind}{rounded}", inputs=inputs)


def _outlier(make: Maker) -> Inputs:
    """The largest magnitude far from the start, where another program finds it."""
    x = make.normal(37, 33, grad=False)
    x[30, 20] = -100
    return {"x": x, "dtype": E4M3, "power_of_2_scale": False}


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Reads x, once where it stays in the cache, and writes one byte for each value."""
    x = inputs["x"]
    return Cost(bytes=x.numel() * (x.element_size() + 1)), Cost(bytes=0)


def _eager(x: Tensor, dtype: torch.dtype, power_of_2_scale: bool) -> tuple[Tensor, Tensor]:
    """What a user of torch alone writes."""
    largest = torch.finfo(dtype).max
    scale = (largest / x.abs().amax().double().clamp(min=1e-12)).float()
    if power_of_2_scale:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale


def _torchao(x: Tensor, dtype: torch.dtype, power_of_2_scale: bool) -> tuple[Tensor, Tensor]:
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    scale = tensor_to_scale(x, dtype, round_scales_to_power_of_2=power_of_2_scale)
    return to_fp8_saturated(x.float() * scale, dtype), scale


SAMPLES = OpSamples(
    name="fp8_quantize",
    function=fp8_quantize,
    small=(
        _call(37, 33),
        _call(5, 12, dtype=E5M2, scale=1e-3),
        _call(3, 4, 7, power_of_2=True, scale=1e4),
        Sample(name="outlier", inputs=_outlier),
        _call(0, 8),
        _call(1),
        _call(3, 0),
    ),
    real=(_call(8192, 4096), _call(14336, 4096), _call(8192, 14336, dtype=E5M2)),
    laptop=(_call(2048, 1024),),
    cost=cost,
    eager=_eager,
    peers=(Peer(name="torchao", function=_torchao),),
)
