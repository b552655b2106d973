"""What autocast would do to an op of torch that multiplies matrices; it knows nothing of ours."""

from typing import Any

import torch
from torch import Tensor


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """In the dtype that autocast wants for matrix products; as they are without it.

    As in torch, float64 stays what it is, and the gradient goes back into each tensor's own dtype.
    """
    device = next(each.device.type for each in tensors if each is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(each if each is None or _stays(each) else each.to(dtype) for each in tensors)


def _stays(x: Tensor) -> bool:
    return x.dtype == torch.float64 or not x.is_floating_point() or x.dtype.itemsize == 1
