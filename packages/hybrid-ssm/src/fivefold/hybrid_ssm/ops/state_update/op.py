"""``state_update`` as a registered op: shapes for tracing, checks.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

import math
from typing import NamedTuple

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

# The inputs as backends take them.
Arguments = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    bool,
    float,
    float,
]


class Inputs(NamedTuple):
    """``Arguments`` by name.

    Attributes:
        state: (B, H, P, N), which becomes the next one.
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N).
        C: like B.
        D: (H,) or None.
        z: like x, or None.
        dt_bias: (H,) or None.
        dt_softplus: whether step sizes go through softplus.
        dt_min: least step size.
        dt_max: greatest.
    """

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = math.inf

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors."""
        return self[:9]

    @property
    def limits(self) -> tuple[bool, float, float]:
        """Softplus or not, least and greatest step size."""
        return self.dt_softplus, self.dt_min, self.dt_max


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


def apply(inputs: Inputs, backend: str | None) -> tuple[Tensor, Tensor]:
    """See ``state_update``: in place on a copy, or the scan of one token for its gradients."""
    check(inputs)
    if not wants_gradient(*inputs.tensors):
        state = inputs.state.clone()
        return state_update_step(*inputs._replace(state=state), backend), state
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *_ = inputs
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
        dt_limit=inputs.limits[1:],
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return found[0].squeeze(1), found[1].to(state.dtype)


def apply_(inputs: Inputs, backend: str | None) -> Tensor:
    """See ``state_update_``: check and run."""
    check(inputs)
    check_no_gradient("state_update_", "state_update", *inputs.tensors)
    return state_update_step(*inputs, backend)


def check(inputs: Inputs) -> None:
    """Raise ``HybridInputError`` unless the inputs fit together."""
    state, x, B = inputs.state, inputs.x, inputs.B
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
        ("dt", inputs.dt, (batch, num_heads)),
        ("A", inputs.A, heads),
        ("C", inputs.C, tuple(B.shape)),
        ("D", inputs.D, heads),
        ("z", inputs.z, tuple(x.shape)),
        ("dt_bias", inputs.dt_bias, heads),
    )
    check_shapes("state_update", x, wanted)
    check_limits("state_update", inputs.limits[1:])
    if not state.is_floating_point():
        raise HybridInputError(f"state_update takes a floating-point state, found {state.dtype}")


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in: float64 if anything is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
