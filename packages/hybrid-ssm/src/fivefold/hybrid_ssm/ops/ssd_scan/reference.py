"""The specification of ``ssd_scan`` token by token, and its gradient written out.

Legend: B batch, S tokens, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.op import Arguments, Gradients, Inputs

# States that the gradient keeps are this many tokens apart; those between are computed again.
_KEPT_EVERY = 64

# Whether there is softplus, least and greatest step size.
Limits = tuple[bool, float, float]


def ssd_scan_forward(*inputs: *Arguments) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    given = Inputs(*inputs)
    x, A, B, D, documents = given.x, given.A, given.B, given.D, given.documents
    x_bshp, C_bsgn = _wide(x), _wide(given.C)
    dt_bsh = step_sizes(given.dt, given.dt_bias, given.limits, x_bshp.dtype)
    decay_bsh = _decays(dt_bsh, A, documents)
    heads_in_group = x.shape[2] // B.shape[2]
    state_bhpn = _first_state(x_bshp, B, given.initial_state)
    results = []
    for t in range(x.shape[1]):
        state_bhpn = _step(state_bhpn, t, decay_bsh, dt_bsh, x_bshp, B)
        C_bhn = C_bsgn[:, t].repeat_interleave(heads_in_group, 1)
        results.append(torch.einsum("bhpn,bhn->bhp", state_bhpn, C_bhn))
    y_bshp = torch.stack(results, 1) if results else x_bshp
    if D is not None:
        y_bshp = y_bshp + _wide(D, x_bshp.dtype).unsqueeze(-1) * x_bshp
    # Not the initial state itself where there are no tokens: an op returns memory of its own.
    return y_bshp.to(x.dtype, copy=not results), state_bhpn.clone()


def ssd_scan_backward(dy: Tensor, dfinal_state: Tensor | None, *inputs: *Arguments) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    given = Inputs(*inputs)
    x, _, A, B, C, D, _, initial_state, documents, *_ = given
    x_bshp, dy_bshp, B_bsgn, C_bsgn = _wide(x), _wide(dy), _wide(B), _wide(C)
    compute = x_bshp.dtype
    dt_bsh = step_sizes(given.dt, given.dt_bias, given.limits, compute)
    decay_bsh = _decays(dt_bsh, A, documents)
    heads_in_group = x.shape[2] // B.shape[2]
    kept = _kept_states(x_bshp, B, initial_state, decay_bsh, dt_bsh)

    dx_bshp, ddt_bsh = torch.zeros_like(x_bshp), torch.zeros_like(dt_bsh)
    dB_bsgn, dC_bsgn = torch.zeros_like(B_bsgn), torch.zeros_like(C_bsgn)
    dlog_bsh = torch.zeros_like(dt_bsh)  # of the logarithms of the decays
    dstate = torch.zeros_like(kept[0]) if dfinal_state is None else _wide(dfinal_state).clone()
    for start in reversed(range(0, x.shape[1], _KEPT_EVERY)):
        tokens = range(start, min(start + _KEPT_EVERY, x.shape[1]))
        states = [kept[start // _KEPT_EVERY]]
        for t in tokens:
            states.append(_step(states[-1], t, decay_bsh, dt_bsh, x_bshp, B))
        for t in reversed(tokens):
            after, before = states.pop(), states[-1]
            B_bhn = B_bsgn[:, t].repeat_interleave(heads_in_group, 1)
            C_bhn = C_bsgn[:, t].repeat_interleave(heads_in_group, 1)
            dstate = dstate + dy_bshp[:, t].unsqueeze(-1) * C_bhn.unsqueeze(2)
            dC_bsgn[:, t] = _of_groups(torch.einsum("bhpn,bhp->bhn", after, dy_bshp[:, t]), C)
            dinput_bhp = torch.einsum("bhpn,bhn->bhp", dstate, B_bhn)
            dB_bhn = torch.einsum("bhpn,bhp->bhn", dstate, x_bshp[:, t]) * dt_bsh[:, t, :, None]
            dB_bsgn[:, t] = _of_groups(dB_bhn, B)
            dx_bshp[:, t] = dinput_bhp * dt_bsh[:, t, :, None]
            ddt_bsh[:, t] = (dinput_bhp * x_bshp[:, t]).sum(-1)
            dstate_before = dstate * decay_bsh[:, t, :, None, None]
            dlog_bsh[:, t] = (dstate_before * before).sum((2, 3))
            dstate = dstate_before

    ddt_bsh += dlog_bsh * _wide(A, compute)
    dA = (dlog_bsh * dt_bsh).sum((0, 1)).to(A.dtype)
    dD = x.new_empty(0)
    if D is not None:
        dD = (dy_bshp * x_bshp).sum((0, 1, 3)).to(D.dtype)
        dx_bshp += dy_bshp * _wide(D, compute).unsqueeze(-1)
    ddt, ddt_bias = step_sizes_backward(ddt_bsh, given.dt, given.dt_bias, given.limits)
    dinitial = x.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype)
    return (
        dx_bshp.to(x.dtype),
        ddt,
        dA,
        dB_bsgn.to(B.dtype),
        dC_bsgn.to(C.dtype),
        dD,
        ddt_bias,
        dinitial,
    )


def step_sizes(dt: Tensor, dt_bias: Tensor | None, limits: Limits, compute: torch.dtype) -> Tensor:
    """What the recurrence calls dt: with bias, softplus and limits, like ``dt``."""
    softplus, least, greatest = limits
    return torch.clamp(_softened(dt, dt_bias, softplus, compute), least, greatest)


def step_sizes_backward(
    dsteps: Tensor, dt: Tensor, dt_bias: Tensor | None, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Gradients of ``dt`` and ``dt_bias``, empty (0,) where absent, as autograd has them."""
    compute = dsteps.dtype
    dt_softplus, dt_min, dt_max = limits
    before = _softened(dt, dt_bias, False, compute)
    after = F.softplus(before) if dt_softplus else before
    ddt = dsteps * ((after >= dt_min) & (after <= dt_max))
    if dt_softplus:
        # Softplus is the identity above 20, as in torch.
        ddt = torch.where(before > 20, ddt, ddt * torch.sigmoid(before))
    if dt_bias is None:
        return ddt.to(dt.dtype), dt.new_empty(0)
    return ddt.to(dt.dtype), ddt.sum(tuple(range(ddt.dim() - 1))).to(dt_bias.dtype)


def _softened(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, compute: torch.dtype
) -> Tensor:
    dt = dt.to(compute)
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    return F.softplus(dt) if dt_softplus else dt


def _decays(dt_bsh: Tensor, A: Tensor, documents: Tensor | None) -> Tensor:
    """What is left of the state at each token, (B, S, H): 0 where a document begins."""
    decay_bsh = torch.exp(dt_bsh * A.to(dt_bsh.dtype))
    if documents is None:
        return decay_bsh
    begins_bs = torch.zeros_like(documents, dtype=torch.bool)
    begins_bs[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return decay_bsh.masked_fill(begins_bs.unsqueeze(-1), 0)


def _first_state(x_bshp: Tensor, B: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(x_bshp.dtype)
    return x_bshp.new_zeros(x_bshp.shape[0], *x_bshp.shape[2:], B.shape[3])


def _step(
    state_bhpn: Tensor, t: int, decay_bsh: Tensor, dt_bsh: Tensor, x_bshp: Tensor, B: Tensor
) -> Tensor:
    """The state after token t."""
    B_bhn = B[:, t].to(x_bshp.dtype).repeat_interleave(x_bshp.shape[2] // B.shape[2], 1)
    input_bhp = dt_bsh[:, t].unsqueeze(-1) * x_bshp[:, t]
    decayed_bhpn = decay_bsh[:, t, :, None, None] * state_bhpn
    return decayed_bhpn + input_bhp.unsqueeze(-1) * B_bhn.unsqueeze(2)


def _kept_states(
    x_bshp: Tensor,
    B: Tensor,
    initial_state: Tensor | None,
    decay_bsh: Tensor,
    dt_bsh: Tensor,
) -> list[Tensor]:
    """The states before tokens 0, 64, 128 and so on."""
    state = _first_state(x_bshp, B, initial_state)
    kept = [state]
    for t in range(x_bshp.shape[1]):
        state = _step(state, t, decay_bsh, dt_bsh, x_bshp, B)
        if (t + 1) % _KEPT_EVERY == 0:
            kept.append(state)
    return kept


def _of_groups(x_bhn: Tensor, like: Tensor) -> Tensor:
    """Sums over the heads of each group, (B, G, N)."""
    num_groups = like.shape[2]
    heads_in_group = x_bhn.shape[1] // num_groups
    # Not unflatten with -1: an empty batch has no size to find it from.
    return x_bhn.reshape(x_bhn.shape[0], num_groups, heads_in_group, x_bhn.shape[2]).sum(2)


def _wide(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the dtype that sums are made in: at least float32."""
    return x.to(dtype or torch.promote_types(x.dtype, torch.float32))
