"""``rotary`` in C++.

Legend: B sequences, T tokens, H heads, D values in a head, P pairs of them that are rotated.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import sum_dtype

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, x: Tensor, *_: object) -> str | None:
    """Dtypes that C++ has no name for, and machines that cannot compile it."""
    if x.dtype not in native.TYPES:
        return f"it computes with {', '.join(map(str, native.TYPES))}, these are {x.dtype}"
    return native.refusal(SOURCE)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_first: bool, inverse: bool
) -> Tensor:
    """``x``, rotated, and back if ``inverse``; contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype)
    y_bthd = y.transpose(1, 2) if heads_first else y
    x_bthd = _dense(x.transpose(1, 2) if heads_first else x)
    wide = sum_dtype(x.dtype)
    cos_btp, sin_btp = _dense(cos.to(wide)), _dense(sin.to(wide))
    native.call(
        native.load(SOURCE).rotary,
        x_bthd,
        cos_btp,
        sin_btp,
        y_bthd,
        *x_bthd.shape,
        cos_btp.shape[2],
        *x_bthd.stride()[:3],
        *_angle_strides(cos_btp),
        *_angle_strides(sin_btp),
        *y_bthd.stride()[:3],
        interleaved,
        -1.0 if inverse else 1.0,
        native.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def _dense(x: Tensor) -> Tensor:
    """With values of the last dim side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _angle_strides(table: Tensor) -> tuple[int, int]:
    """From sequence to sequence, 0 if all have the same, and from token to token."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)
