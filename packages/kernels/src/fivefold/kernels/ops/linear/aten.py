"""``linear`` by oneDNN, whose float32 products torch brings for its compiled graphs.

Legend: M rows of the input, K its width, N width of the result.
"""

from typing import Any

import torch
from torch import Tensor


def refuses(name: str, *inputs: Any) -> str | None:
    """Other dtypes and devices, and sizes of which there is nothing to multiply."""
    x, weight, _ = inputs
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"it is for float32 on the CPU, this is {x.dtype} on {x.device}"
    if 0 in (*x.shape, *weight.shape):
        return f"oneDNN takes no empty operands, these are {tuple(x.shape)}, {tuple(weight.shape)}"
    return None


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (M, K), ``weight`` (N, K) and ``bias`` (N,) to the result (M, N)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
