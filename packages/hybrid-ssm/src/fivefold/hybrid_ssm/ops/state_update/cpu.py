"""``state_update`` in C++, see cpu.cpp.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.state_update.op import Arguments, Inputs, wide
from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: Any) -> str | None:
    """A state that is coarser than what is computed in, unless that is float32."""
    state, x = inputs[:2]
    if state.dtype not in native.TYPES or wide(state.dtype) != wide(state.dtype, x.dtype):
        return f"its kernel computes as the state has it, here {state.dtype}, and x is {x.dtype}"
    return native.refusal(SOURCE)


def state_update_step(*inputs: *Arguments) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, H, P)."""
    given = Inputs(*inputs)
    state, x, compute = given.state, given.x, wide(given.state.dtype)
    dense = state.contiguous()
    y = torch.empty(x.shape, dtype=compute)
    native.call(
        native.load(SOURCE).state_update_step,
        native.TYPES[state.dtype],
        *x.shape,
        *given.B.shape[1:],
        dense,
        *(_plain(each, compute) for each in given.tensors[1:]),
        *given.limits,
        y,
        torch.get_num_threads(),
    )
    if dense is not state:
        state.copy_(dense)
    return y.to(x.dtype)


def _plain(x: Tensor | None, compute: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(compute).contiguous()
