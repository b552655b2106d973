"""What ``FusedAdamW`` can be asked for."""

from typing import Any

from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.adamw.op import DTYPES


def check_optimizer(max_norm: float | None) -> None:
    """Raise ``KernelInputError`` unless the options of the whole optimizer make sense."""
    if max_norm is not None and not max_norm >= 0:
        raise KernelInputError(f"max_norm has to be at least 0, found {max_norm}")


def check_group(group: dict[str, Any]) -> None:
    """Raise ``KernelInputError`` unless the options and parameters of a group make sense."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise KernelInputError(f"lr has to be one value, found shape {tuple(lr.shape)}")
    else:
        _check_at_least_0(lr=lr)
    _check_at_least_0(eps=group["eps"], weight_decay=group["weight_decay"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise KernelInputError(f"betas have to be two numbers from 0 and below 1, found {betas}")
    decay = group["ema_decay"]
    if decay is not None and not 0 <= decay <= 1:
        raise KernelInputError(f"ema_decay has to be from 0 to 1, found {decay}")
    if decay is not None and group["swa"]:
        raise KernelInputError(
            f"there is one average of a parameter: found ema_decay {decay} and swa, choose one"
        )
    for param in group["params"]:
        if param.dtype not in DTYPES:
            legal = ", ".join(str(each) for each in DTYPES)
            raise KernelInputError(f"FusedAdamW takes parameters of {legal}, found {param.dtype}")


def _check_at_least_0(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:
            raise KernelInputError(f"{name} has to be at least 0, found {value}")
