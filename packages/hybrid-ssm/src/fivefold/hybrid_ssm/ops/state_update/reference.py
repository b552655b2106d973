"""The specification of ``state_update`` in plain PyTorch.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N806 - the paper's names A, B, C and D

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.reference import step_sizes
from fivefold.hybrid_ssm.ops.state_update.op import Arguments, Inputs, wide


def state_update_step(*inputs: *Arguments) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, H, P)."""
    given = Inputs(*inputs)
    state, x, B, D, z = given.state, given.x, given.B, given.D, given.z
    compute = wide(state.dtype, x.dtype)
    x_bhp, heads_in_group = x.to(compute), x.shape[1] // B.shape[1]
    dt_bh = step_sizes(given.dt, given.dt_bias, given.limits, compute)
    decay_bh = torch.exp(dt_bh * given.A.to(compute))
    B_bhn = B.to(compute).repeat_interleave(heads_in_group, 1)
    C_bhn = given.C.to(compute).repeat_interleave(heads_in_group, 1)
    input_bhp = dt_bh.unsqueeze(-1) * x_bhp
    state_bhpn = decay_bh[..., None, None] * state.to(compute)
    state_bhpn = state_bhpn + input_bhp.unsqueeze(-1) * B_bhn.unsqueeze(2)
    state.copy_(state_bhpn)
    y_bhp = torch.einsum("bhpn,bhn->bhp", state_bhpn, C_bhn)
    if D is not None:
        y_bhp = y_bhp + D.to(compute).unsqueeze(-1) * x_bhp
    if z is not None:
        y_bhp = y_bhp * F.silu(z.to(compute))
    return y_bhp.to(x.dtype)
