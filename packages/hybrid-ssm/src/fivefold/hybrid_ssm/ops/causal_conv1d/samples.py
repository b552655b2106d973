"""Calls of ``causal_conv1d``: odd ones for tests, those of models for benchmarks.

Legend: B batch, S tokens, K channels, W taps.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.causal_conv1d import causal_conv1d
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Peer, Sample


def _plain(batch: int, num_tokens: int, num_channels: int, taps: int, **options: Any) -> Sample:
    def inputs(make: Maker) -> Inputs:
        return {
            "x": make.normal(batch, num_tokens, num_channels),
            "weight": make.normal(num_channels, taps),
            "bias": make.normal(num_channels),
        } | options

    return Sample(name=f"{batch}x{num_tokens}x{num_channels}, {taps} taps", inputs=inputs)


def _all(name: str, num_channels: int, taps: int, seq_ids: list[list[int]]) -> Sample:
    def inputs(make: Maker) -> Inputs:
        batch, num_tokens = len(seq_ids), len(seq_ids[0])
        return {
            "x": make.normal(batch, num_tokens, num_channels),
            "weight": make.normal(num_channels, taps),
            "bias": make.normal(num_channels),
            "initial_state": make.normal(batch, taps - 1, num_channels),
            "seq_ids": make.values(seq_ids),
            "return_final_state": True,
        }

    return Sample(name=name, inputs=inputs)


def _bare(make: Maker) -> Inputs:
    x, weight = make.normal(2, 6, 5), make.normal(5, 2)
    return {"x": x, "weight": weight, "activation": None, "return_final_state": True}


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Reads x and writes y; backward reads x and dy and writes dx."""
    x = inputs["x"]
    num_bytes = x.numel() * x.element_size()
    return Cost(bytes=2 * num_bytes), Cost(bytes=3 * num_bytes)


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    taps, channels = weight.shape[1], x.shape[2]
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)
    y = y[..., : x.shape[1]].mT
    return F.silu(y) if options.get("activation", "silu") else y


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.mT, weight, bias, activation=options.get("activation", "silu")).mT


SAMPLES = OpSamples(
    name="causal_conv1d",
    function=causal_conv1d,
    eager=_eager,
    small=(
        _all("all", 21, 4, [[0] * 5 + [7] * 2 + [0] * 7, [0] * 13 + [1]]),
        _plain(2, 35, 5, 3),
        _all("short", 6, 4, [[2, 2]]),
        Sample(name="bare", inputs=_bare),
        _plain(1, 3, 7, 1),
        _all("many channels", 530, 2, [[0, 1]]),
        _all("two taps", 5, 2, [[0, 0, 1, 1, 1]]),
        _plain(0, 4, 8, 4),
    ),
    real=(
        _plain(1, 8192, 10240, 4),
        _plain(8, 2048, 5376, 4),
    ),
    laptop=(
        _plain(1, 1024, 6144, 4),
        _plain(4, 512, 1536, 4),
    ),
    cost=cost,
    peers=(Peer(name="causal-conv1d", function=_causal_conv1d),),
)
