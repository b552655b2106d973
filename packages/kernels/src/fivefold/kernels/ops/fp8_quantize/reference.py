"""The specification of ``fp8_quantize`` in plain PyTorch.

Legend: R rows, C columns.
"""

import torch
from torch import Tensor

# The least amax: tensors of zeros get a finite scale.
SMALLEST_AMAX = 1e-12


def fp8_quantize(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float8 values (R, C), their transpose (C, R) or an empty (0,), and the scale ()."""
    scale = _scale(x, dtype, power_of_2)
    largest = torch.finfo(dtype).max
    # Casts of torch before 2.12 do not saturate.
    x_rc = (x.to(torch.float32) * scale).clamp(-largest, largest).to(dtype).contiguous()
    x_cr = x_rc.new_empty(0)
    if transposed:
        x_cr = x_rc.t().clone(memory_format=torch.contiguous_format)
    return x_rc, x_cr, scale


def _scale(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> Tensor:
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    largest = torch.finfo(dtype).max
    scale = (largest / amax.to(torch.float64).clamp(min=SMALLEST_AMAX)).to(torch.float32)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale
