"""``relu2`` in C++."""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, x: Tensor, *_: object) -> str | None:
    """Dtypes that C++ has no name for, and machines that cannot compile it."""
    if x.dtype not in native.TYPES:
        return f"it computes with {', '.join(map(str, native.TYPES))}, these are {x.dtype}"
    return native.refusal(SOURCE)


def relu2_forward(x: Tensor) -> Tensor:
    """``relu(x)²``, contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype)
    _call("relu2_forward", x.contiguous(), y)
    return y


def relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``2 relu(x) dy``, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    _call("relu2_backward", dy.contiguous(), x.contiguous(), dx)
    return dx


def _call(name: str, *tensors: Tensor) -> None:
    x = tensors[0]
    native.call(
        getattr(native.load(SOURCE), name),
        *tensors,
        x.numel(),
        native.TYPES[x.dtype],
        torch.get_num_threads(),
    )
