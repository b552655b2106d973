"""``state_update`` in C++, see cpu.cpp.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803 - the paper's names A, B, C and D

from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.state_update.op import wide
from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """A state that is coarser than what is computed in, unless that is float32."""
    state, x = inputs[:2]
    assert isinstance(state, Tensor) and isinstance(x, Tensor)
    if state.dtype not in native.TYPES or wide(state.dtype) != wide(state.dtype, x.dtype):
        return f"its kernel computes as the state has it, here {state.dtype}, and x is {x.dtype}"
    return native.refusal(SOURCE)


def state_update_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, H, P)."""
    compute = wide(state.dtype)
    dense = state.contiguous()
    y = torch.empty(x.shape, dtype=compute)
    native.call(
        native.load(SOURCE).state_update_step,
        native.TYPES[state.dtype],
        *x.shape,
        *B.shape[1:],
        dense,
        *(_plain(each, compute) for each in (x, dt, A, B, C, D, z, dt_bias)),
        dt_softplus,
        dt_min,
        dt_max,
        y,
        torch.get_num_threads(),
    )
    if dense is not state:
        state.copy_(dense)
    return y.to(x.dtype)


def _plain(x: Tensor | None, compute: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(compute).contiguous()
