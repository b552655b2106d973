"""What all Triton kernels of ``attention`` are given: operands, steps in memory, sizes, constants.

Legend: N rows of all batches, B batches, R rows that share a bias, H query heads, G key heads,
Tq queries, Tk keys.
"""

import struct

import torch
from torch import Tensor

from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.attention.shapes import rows_of
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, float32_precision

# Tensor cores take no less.
_NARROWEST = 16


class Call:
    """One call as the kernels see it, with batches and rows folded into N.

    Args:
        query: (B, R, H, Tq, D).
        key: (B, R, G, Tk, D).
        value: (B, R, G, Tk, Dv).
        bias: (B, H or 1, Tq or 1, Tk or 1).
        key_mask: (B, R, Tk).
        band: its start and end; None where there is no bound.
        scale: of the scores.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        band: tuple[int | None, int | None],
        scale: float,
    ):
        _, rows, heads, num_queries, width = query.shape
        folded = [rows_of(x) for x in (query, key, value)]
        # Bytes, because a kernel's pointer to single bits is not the same everywhere.
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        sizes = (rows, heads, heads // key.shape[2], num_queries, key.shape[3])
        self.operands = (*folded, bias, mask)
        self.strides = tuple(step for x in folded for step in x.stride()[:3])
        self.bias_strides = _bias_strides(bias, heads, num_queries, key.shape[3])
        self.numbers = (*sizes, *band, *_in_two(scale))
        self.widest = max(width, value.shape[-1])
        self.wide = sum_dtype(query.dtype)
        self.constants = {
            "WIDTH": width,
            "V_WIDTH": value.shape[-1],
            "PADDED": max(_NARROWEST, next_power_of_2(width)),
            "V_PADDED": max(_NARROWEST, next_power_of_2(value.shape[-1])),
            "COMPUTE": accumulator(query.dtype),
            "PRECISION": float32_precision(),
        }


def by_position(x: Tensor, width: int) -> Tensor:
    """New (B, R, heads, T, width) that lies in memory as (B, R, T, heads, width)."""
    batch, rows, heads, length, _ = x.shape
    shape = (batch, rows, length, heads, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device).transpose(2, 3)


def _bias_strides(
    bias: Tensor | None, heads: int, num_queries: int, num_keys: int
) -> tuple[int, ...]:
    """Steps in memory along batch, head, query and key; 0 where broadcast."""
    if bias is None:
        return 0, 0, 0, 0
    return bias.expand(bias.shape[0], heads, num_queries, num_keys).stride()


def _in_two(x: float) -> tuple[float, float]:
    """A number as the sum of two: kernels take numbers as float32, and some compute in float64."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high
