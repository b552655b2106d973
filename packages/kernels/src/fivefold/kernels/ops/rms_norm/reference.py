"""The specification of ``rms_norm`` in plain PyTorch, and its gradient written out.

Legend: R rows, N values in a row, G groups in a row, S values in a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.kernels.operands import widened


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    gate_first: bool,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """The result (R, N) and 1/rms (R, G)."""
    x_rn = widened(x)
    if gate is not None and gate_first:
        x_rn = x_rn * F.silu(widened(gate))
    x_rgs = _grouped(x_rn, group_size)
    rstd_rg = torch.rsqrt(x_rgs.square().mean(-1) + eps)
    y_rn = (x_rgs * rstd_rg.unsqueeze(-1)).reshape(x.shape)
    if weight is not None:
        y_rn = y_rn * widened(weight)
    if gate is not None and not gate_first:
        y_rn = y_rn * F.silu(widened(gate))
    return y_rn.to(x.dtype), rstd_rg


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    gate_first: bool,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``gate``; empty (0,) where absent."""
    dy_rn, x_rn = widened(dy), widened(x)
    silu_rn = None if gate is None else F.silu(widened(gate))
    inner_rn = x_rn * silu_rn if silu_rn is not None and gate_first else x_rn
    normed_rgs = _grouped(inner_rn, group_size) * rstd.unsqueeze(-1)
    normed_rn = normed_rgs.reshape(x.shape)

    dscaled_rn = dy_rn if silu_rn is None or gate_first else dy_rn * silu_rn
    dnormed_rn = dscaled_rn if weight is None else dscaled_rn * widened(weight)
    dnormed_rgs = _grouped(dnormed_rn, group_size)
    projection_rg1 = (dnormed_rgs * normed_rgs).mean(-1, keepdim=True)
    dinner_rgs = (dnormed_rgs - normed_rgs * projection_rg1) * rstd.unsqueeze(-1)
    dinner_rn = dinner_rgs.reshape(x.shape)

    dx_rn = dinner_rn if silu_rn is None or not gate_first else dinner_rn * silu_rn
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = (dscaled_rn * normed_rn).sum(0).to(weight.dtype)
    dgate = x.new_empty(0)
    if gate is not None:
        dsilu_rn = dinner_rn * x_rn if gate_first else dy_rn * normed_rn
        if weight is not None and not gate_first:
            dsilu_rn = dsilu_rn * widened(weight)
        dgate = (dsilu_rn * _silu_slope(widened(gate))).to(gate.dtype)
    return dx_rn.to(x.dtype), dweight, dgate


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _grouped(x_rn: Tensor, group_size: int) -> Tensor:
    # Not unflatten with -1: a row of no values has no groups, and that must not be an error.
    num_groups = x_rn.shape[1] // max(group_size, 1)
    return x_rn.reshape(x_rn.shape[0], num_groups, group_size)
