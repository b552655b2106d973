"""What ``FusedAdamW`` keeps for a parameter, under the names that ``torch.optim.AdamW`` has.

===============  =========================================================================
state            what it is
===============  =========================================================================
``step``         how many steps it has had, float32 ()
``exp_avg``      first moment, in the dtype of the parameter or, with a master, the master's
``exp_avg_sq``   second moment, in the dtype of ``exp_avg``
``master``       the parameter in float32; for those of less than 32 bits, if asked for
``ema``          the average, in at least float32; if asked for
``ema_step``     how many values are in the average, float32 ()
===============  =========================================================================
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.operands import sum_dtype

State = dict[str, Any]


def complete(state: State, param: Tensor, group: dict[str, Any], average: bool) -> None:
    """Begin what a parameter has no state of yet: all of it, or what was not asked for before.

    Args:
        state: of the parameter.
        param: the parameter.
        group: whose options it has.
        average: whether this step enters the average.
    """
    dtype = sum_dtype(param.dtype)
    has_master = group["master_weights"] and param.dtype != dtype
    if "step" not in state:
        state["step"] = _zero(param)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(
                param, dtype=dtype if has_master else None, memory_format=torch.preserve_format
            )
    if has_master and "master" not in state:
        state["master"] = _copy(param, dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(dtype)
    if average and "ema" not in state:
        state["ema"] = _copy(param, dtype)
        state["ema_step"] = _zero(param)


def averages(group: dict[str, Any]) -> bool:
    """Whether averages of a group's parameters were asked for."""
    return group["swa"] or group["ema_decay"] is not None


def check(state_dict: State) -> None:
    """Raise ``KernelInputError`` for a state that cannot be continued."""
    if any(group.get("amsgrad") for group in state_dict["param_groups"]):
        raise KernelInputError(
            "the state is one of amsgrad=True, whose maxima FusedAdamW does not keep: load it into "
            "torch.optim.AdamW"
        )


def restore(state: dict[Tensor, State], groups: list[dict[str, Any]], saved: State) -> None:
    """After torch took a saved state: the dtypes, which it made the parameter's.

    Args:
        state: of the optimizer.
        groups: of the optimizer.
        saved: what it took.
    """
    params = [param for group in groups for param in group["params"]]
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for param, key in zip(params, keys, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            if name in ("step", "ema_step"):
                state[param][name] = _zero(param) + torch.as_tensor(value, device=param.device)
            elif name in ("exp_avg", "exp_avg_sq", "master", "ema"):
                state[param][name] = _laid(value, param, _restored_dtype(name, value, param))


def _restored_dtype(name: str, value: Tensor, param: Tensor) -> torch.dtype:
    wide = sum_dtype(param.dtype)
    if name in ("master", "ema"):
        return wide
    return value.dtype if value.dtype in (param.dtype, wide) else param.dtype


def _laid(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that lies in memory like the parameter; what has another shape the step refuses."""
    if value.shape != param.shape:
        return value.to(dtype=dtype, device=param.device)
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)


def _zero(param: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=param.device)


def _copy(param: Tensor, dtype: torch.dtype) -> Tensor:
    return param.detach().to(dtype, copy=True)
