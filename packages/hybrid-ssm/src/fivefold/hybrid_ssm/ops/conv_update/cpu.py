"""``conv_update`` in C++, see cpu.cpp.

Legend: B batch, K channels, W taps.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """Dtypes that it does not know, and machines where the file cannot be compiled."""
    x = inputs[1]
    if isinstance(x, Tensor) and x.dtype not in native.TYPES:
        return f"its kernel takes float16 to float64, this is {x.dtype}"
    return native.refusal(SOURCE)


def conv_update_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, K)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    dense = state.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    native.call(
        native.load(SOURCE).conv_update_step,
        native.TYPES[x.dtype],
        *x.shape,
        weight.shape[1],
        dense,
        x,
        x.stride(0),
        weight.mT.to(compute).contiguous(),
        None if bias is None else bias.to(compute).contiguous(),
        silu,
        y,
        torch.get_num_threads(),
    )
    if dense is not state:
        state.copy_(dense)
    return y
