"""Scales of tensors that several ranks hold together, and rounding with them.

A rank that holds a part of a tensor uses the largest magnitude of all parts, so that the values it
rounds are those that one process would have.

Policy for values that are no ordinary numbers: a tensor of zeros gets a finite scale and stays
zero; one outlier sets the scale, and what is too small beside it flushes to zero; an infinity or a
NaN makes its tensor's results NaN on every rank, which the training loop counts as a skipped step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.topology import Axis

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_AMAX = 1e-12
"""The least largest magnitude: a tensor of zeros gets a finite scale."""


@dataclass(frozen=True, slots=True)
class Format:
    """How tensors are rounded.

    Attributes:
        grad_dtype: of the gradients of results; all else is in E4M3.
        power_of_2: whether scales are rounded down to powers of two.
    """

    grad_dtype: torch.dtype = E5M2
    power_of_2: bool = False


def largest(tensors: Sequence[Tensor], axis: Axis | None) -> list[Tensor]:
    """Largest magnitude () of each tensor, over all ranks of ``axis``, in one message."""
    found = [x.detach().abs().amax() if x.numel() else x.new_zeros(()) for x in tensors]
    if axis is None or axis.size == 1:
        return found
    mine = torch.stack([each.to(torch.float64) for each in found])
    # amax keeps a NaN of any rank.
    return list(gather_along(mine.unsqueeze(0), axis, 0).amax(0))


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_2: bool) -> Tensor:
    """What values are multiplied with before they are rounded to ``dtype``: float32, ()."""
    most = torch.finfo(dtype).max
    scale = (most / amax.to(torch.float64).clamp(min=SMALLEST_AMAX)).to(torch.float32)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` times its scale in float8."""
    most = torch.finfo(dtype).max
    return (x.detach().to(torch.float32) * scale).clamp(-most, most).to(dtype)


def gathered(x_fp8: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's float8 values laid along ``dim``: one byte each is sent."""
    return gather_along(x_fp8.view(torch.uint8), axis, dim).view(x_fp8.dtype)
