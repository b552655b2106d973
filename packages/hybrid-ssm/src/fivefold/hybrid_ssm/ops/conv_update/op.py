"""``conv_update`` as a registered op: shapes for tracing, checks.

Legend: B batch, K channels, W taps.
"""

from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.causal_conv1d import causal_conv1d
from fivefold.hybrid_ssm.ops.causal_conv1d.op import check_taps
from fivefold.hybrid_ssm.ops.checks import check_no_gradient, check_shapes, wants_gradient
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_hybrid_ssm", backends=BACKENDS, mutates=("state",))
def conv_update_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    backend: str | None,
) -> Tensor:
    """``state`` (B, W - 1, K) to the next one, in place; returns the result (B, K)."""
    return x.new_empty(x.shape)


def apply(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``conv_update``: in place on a copy, or a sequence of one token for its gradients."""
    check(state, x, weight, bias, activation)
    if not wants_gradient(state, x, weight, bias):
        state = state.clone()
        return conv_update_step(state, x, weight, bias, activation == "silu", backend), state
    found = causal_conv1d(
        x.unsqueeze(1),
        weight,
        bias,
        activation=activation,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return found[0].squeeze(1), found[1].to(state.dtype)


def apply_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    """See ``conv_update_``: check and run."""
    check(state, x, weight, bias, activation)
    check_no_gradient("conv_update_", "conv_update", state, x, weight, bias)
    return conv_update_step(state, x, weight, bias, activation == "silu", backend)


def check(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Raise ``HybridInputError`` unless the inputs fit together."""
    if x.dim() != 2 or not x.is_floating_point():
        raise HybridInputError(
            f"conv_update takes floating-point x (batch, channels), found {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    check_taps("conv_update", x, weight, bias, activation)
    wanted = (("state", state, (x.shape[0], weight.shape[1] - 1, x.shape[1])),)
    check_shapes("conv_update", x, wanted)
    if state.dtype != x.dtype:
        raise HybridInputError(
            f"conv_update keeps inputs as they are: its state has the dtype of x, found "
            f"{state.dtype} and {x.dtype}"
        )
