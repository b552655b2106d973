"""The specification of ``rotary`` in plain PyTorch.

Legend: B sequences, T tokens, H heads, D values in a head, P pairs of them that are rotated.
"""

import torch
from torch import Tensor

from fivefold.kernels.operands import sum_dtype


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_first: bool, inverse: bool
) -> Tensor:
    """``x``, rotated, and back if ``inverse``; contiguous."""
    num_rotated = 2 * cos.shape[-1]
    rotated, passed = x[..., :num_rotated], x[..., num_rotated:]
    wide = sum_dtype(x.dtype)
    heads = 1 if heads_first else 2
    cos_p, sin_p = cos.to(wide).unsqueeze(heads), sin.to(wide).unsqueeze(heads)
    sin_p = -sin_p if inverse else sin_p
    if interleaved:
        a_p, b_p = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a_p, b_p = rotated.chunk(2, dim=-1)
    turned = (a_p * cos_p - b_p * sin_p, b_p * cos_p + a_p * sin_p)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), passed), dim=-1).contiguous()
