"""``state_update`` as a registered op: shapes for tracing, checks.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803 - the paper's names A, B, C and D

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.checks import (
    check_limits,
    check_no_gradient,
    check_shapes,
    wants_gradient,
)
from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_hybrid_ssm", backends=BACKENDS, mutates=("state",))
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
    backend: str | None,
) -> Tensor:
    """``state`` (B, H, P, N) to the next one, in place; returns the result (B, H, P)."""
    return x.new_empty(x.shape)


def apply(
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
    dt_limit: tuple[float, float],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``state_update``: in place on a copy, or the scan of one token for its gradients."""
    check(state, x, dt, A, B, C, D, z, dt_bias, dt_limit)
    if not wants_gradient(state, x, dt, A, B, C, D, z, dt_bias):
        state = state.clone()
        limits = (float(dt_limit[0]), float(dt_limit[1]))
        y = state_update_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *limits, backend)
        return y, state
    found = ssd_scan(
        x.unsqueeze(1),
        dt.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D=D,
        z=None if z is None else z.unsqueeze(1),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return found[0].squeeze(1), found[1].to(state.dtype)


def apply_(
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
    dt_limit: tuple[float, float],
    backend: str | None,
) -> Tensor:
    """See ``state_update_``: check and run."""
    check(state, x, dt, A, B, C, D, z, dt_bias, dt_limit)
    check_no_gradient("state_update_", "state_update", state, x, dt, A, B, C, D, z, dt_bias)
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    return state_update_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *limits, backend)


def check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    """Raise ``HybridInputError`` unless the inputs fit together."""
    if x.dim() != 3 or not x.is_floating_point():
        raise HybridInputError(
            f"state_update takes floating-point x (batch, heads, head_dim), found {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )
    batch, num_heads, head_dim = x.shape
    if B.dim() != 3 or B.shape[0] != batch or B.shape[1] < 1 or num_heads % B.shape[1]:
        raise HybridInputError(
            f"state_update of x {tuple(x.shape)} takes B of shape ({batch}, groups, state) whose "
            f"groups divide the {num_heads} heads, found {tuple(B.shape)}"
        )
    heads = (num_heads,)
    wanted = (
        ("state", state, (batch, num_heads, head_dim, B.shape[2])),
        ("dt", dt, (batch, num_heads)),
        ("A", A, heads),
        ("C", C, tuple(B.shape)),
        ("D", D, heads),
        ("z", z, tuple(x.shape)),
        ("dt_bias", dt_bias, heads),
    )
    check_shapes("state_update", x, wanted)
    check_limits("state_update", dt_limit)
    if not state.is_floating_point():
        raise HybridInputError(f"state_update takes a floating-point state, found {state.dtype}")


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in: float64 if anything is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
