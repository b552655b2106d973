"""Calls of ``outer_product``: odd ones for tests, those of the network for benchmarks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.fold.ops.outer_product import outer_product
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample


def _call(
    *lead: int,
    sequences: int,
    residues: tuple[int, int],
    channels: tuple[int, int],
    width: int,
    bias: bool = True,
    num_rows: int | None = None,
) -> Sample:
    def inputs(make: Maker) -> Inputs:
        inner = channels[0] * channels[1]
        return {
            "a": make.normal(*lead, sequences, residues[0], channels[0]),
            "b": make.normal(*lead, sequences, residues[1], channels[1]),
            "weight": make.normal(width, inner, scale=max(inner, 1) ** -0.5),
            "bias": make.normal(width) if bias else None,
            "num_rows": num_rows,
        }

    sizes = "x".join(map(str, (*lead, sequences, *residues, *channels, width)))
    return Sample(
        name=f"{sizes} {num_rows or 'all'} rows{'' if bias else ' no bias'}", inputs=inputs
    )


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Two products forward; backward the first again, and two gradients of each."""
    a, b, weight = inputs["a"], inputs["b"], inputs["weight"]
    pairs = a.shape[:-3].numel() * a.shape[-2] * b.shape[-2]
    outer = 2 * pairs * weight.shape[1] * a.shape[-3]
    projected = 2 * pairs * weight.shape[1] * weight.shape[0]
    moved = (a.numel() + b.numel() + weight.numel() + pairs * weight.shape[0]) * a.element_size()
    return (
        Cost(bytes=moved, flops=outer + projected),
        Cost(bytes=2 * moved, flops=3 * outer + 2 * projected),
    )


def eager(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None, num_rows: int | None = None
) -> Tensor:
    """What a user of torch alone writes."""
    return F.linear(torch.einsum("...sic,...sjd->...ijcd", a, b).flatten(-2), weight, bias)


SAMPLES = OpSamples(
    name="outer_product",
    function=outer_product,
    small=(
        _call(2, sequences=5, residues=(4, 3), channels=(3, 2), width=5, num_rows=3),
        _call(sequences=7, residues=(5, 5), channels=(2, 3), width=3, bias=False),
        _call(sequences=1, residues=(1, 7), channels=(1, 1), width=2, num_rows=2),
        _call(1, 2, sequences=3, residues=(2, 3), channels=(2, 2), width=1, num_rows=1),
        _call(sequences=0, residues=(2, 3), channels=(2, 2), width=3),
        _call(sequences=2, residues=(0, 3), channels=(2, 2), width=3),
    ),
    real=(_call(1, sequences=128, residues=(256, 256), channels=(32, 32), width=128),),
    laptop=(_call(1, sequences=36, residues=(64, 64), channels=(32, 32), width=128),),
    cost=cost,
    eager=eager,
    dtypes=(torch.float32, torch.bfloat16),
)
