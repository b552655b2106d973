"""``cross_entropy`` in C++: each pass reads the logits once and keeps nothing but its result.

Legend: N tokens, V classes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import dense_rows, sum_dtype
from fivefold.kernels.ops.cross_entropy.reference import check_range

_SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: Any) -> str | None:
    """A machine that cannot compile the kernel, and dtypes that it does not know."""
    logits = inputs[1] if name == "cross_entropy_backward" else inputs[0]
    if logits.dtype not in native.TYPES:
        return f"it takes {', '.join(map(str, native.TYPES))}, not {logits.dtype}"
    return native.refusal(_SOURCE)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The losses (N,) and log-sum-exps (N,)."""
    check_range(target, logits.shape[1], ignore_index)
    logits, dtype = dense_rows(logits), sum_dtype(logits.dtype)
    loss = torch.empty(logits.shape[0], dtype=dtype)
    lse = torch.empty(logits.shape[0], dtype=dtype)
    weight, total = _weights(weight, logits.shape[1], dtype)
    native.call(
        native.load(_SOURCE).cross_entropy_forward,
        native.TYPES[logits.dtype],
        logits,
        _indices(target),
        weight,
        loss,
        lse,
        *logits.shape,
        logits.stride(0),
        ignore_index,
        total,
        float(label_smoothing),
        float(z_loss),
        torch.get_num_threads(),
    )
    return loss, lse


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of ``logits`` (N, V)."""
    logits = dense_rows(logits)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    weight, total = _weights(weight, logits.shape[1], lse.dtype)
    native.call(
        native.load(_SOURCE).cross_entropy_backward,
        native.TYPES[logits.dtype],
        dloss.to(lse.dtype).contiguous(),
        logits,
        _indices(target),
        weight,
        lse.contiguous(),
        dlogits,
        *logits.shape,
        logits.stride(0),
        ignore_index,
        total,
        float(label_smoothing),
        float(z_loss),
        torch.get_num_threads(),
    )
    return dlogits


def _weights(
    weight: Tensor | None, num_classes: int, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The classes' weights in the dtype of sums, and their sum."""
    if weight is None:
        return None, float(num_classes)
    weight = weight.to(dtype).contiguous()
    return weight, float(weight.sum())


def _indices(target: Tensor) -> Tensor:
    return target.to(torch.int64).contiguous()
