"""``linear`` of a few rows in C++, see cpu.cpp: reading the weights is all there is to do.

Legend: M rows of the input, K its width, N width of the result.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: Any) -> str | None:
    """Dtypes that C++ has no name for, and machines that cannot compile it."""
    x = inputs[0]
    if x.dtype not in native.TYPES:
        return f"it computes with {', '.join(map(str, native.TYPES))}, these are {x.dtype}"
    return native.refusal(SOURCE)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (M, K), ``weight`` (N, K) and ``bias`` (N,) to the result (M, N)."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    native.call(
        native.load(SOURCE).linear_forward,
        x.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        y,
        *x.shape,
        weight.shape[0],
        weight.stride(0),
        native.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y
