"""The specification of ``swiglu`` in plain PyTorch, and its gradient written out.

Legend: R rows, F values in a row of the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.operands import widened


def swiglu_forward(gate: Tensor, up: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """The result (R, F)."""
    gate_rf, up_rf = _halves(gate, up)
    y_rf = F.silu(widened(gate_rf)) * widened(up_rf)
    if row_scale is not None:
        y_rf = y_rf * row_scale.to(y_rf.dtype).unsqueeze(1)
    return y_rf.to(gate.dtype).contiguous()


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, row_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate``, ``up`` and ``row_scale``; empty (0,) where absent."""
    gate_rf, up_rf = (widened(each) for each in _halves(gate, up))
    dy_rf, silu_rf = widened(dy), F.silu(gate_rf)
    dscale = gate.new_empty(0)
    if row_scale is not None:
        dscale = (dy_rf * silu_rf * up_rf).sum(1).to(row_scale.dtype)
        dy_rf = dy_rf * row_scale.to(dy_rf.dtype).unsqueeze(1)
    dgate_rf = torch.ops.aten.silu_backward(dy_rf * up_rf, gate_rf)
    dup_rf = dy_rf * silu_rf
    if up is None:
        return torch.cat((dgate_rf, dup_rf), dim=1).to(gate.dtype), gate.new_empty(0), dscale
    return dgate_rf.to(gate.dtype).contiguous(), dup_rf.to(gate.dtype).contiguous(), dscale


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=1)
    return first, second
