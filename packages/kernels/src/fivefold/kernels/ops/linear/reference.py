"""The specification of ``linear``: torch's own.

Legend: M rows of the input, K its width, N width of the result.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (M, K), ``weight`` (N, K) and ``bias`` (N,) to the result (M, N)."""
    return F.linear(x, weight, bias)
