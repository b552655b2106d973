"""``causal_conv1d`` as registered ops: shapes for tracing, gradients, checks.

Legend: B batch, S tokens, K channels, W taps.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.hybrid_ssm.ops.checks import check_ids, check_shapes
from fivefold.hybrid_ssm.ops.documents import count_documents
from fivefold.kernels.op import define

BACKENDS = ("triton", "cpu", "reference")


@define("fivefold_hybrid_ssm", backends=BACKENDS)
def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``causal_conv1d``: the result (B, S, K) and the final state (B, W - 1, K).

    ``documents`` (B, S) int32 counts the documents of each sequence from 0.
    """
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2]),
    )


@define("fivefold_hybrid_ssm", backends=BACKENDS)
def causal_conv1d_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight``, ``bias`` and ``initial_state``, empty (0,) where absent."""
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.silu, ctx.backend = inputs[5:]


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> Any:
    x, weight, bias, initial_state, documents = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dinitial = causal_conv1d_backward(
        dy, dfinal_state, x, weight, bias, initial_state, documents, ctx.silu, ctx.backend
    )
    dbias = None if bias is None else dbias
    dinitial = None if initial_state is None else dinitial
    return dx, dweight, dbias, dinitial, None, None, None


causal_conv1d_forward.differentiate(_save, _backward)


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``causal_conv1d``: check and run."""
    check(x, weight, bias, activation, initial_state, seq_ids)
    documents = None if seq_ids is None else count_documents(seq_ids)
    silu = activation == "silu"
    return causal_conv1d_forward(x, weight, bias, initial_state, documents, silu, backend)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
) -> None:
    """Raise ``HybridInputError`` unless the inputs fit together."""
    if x.dim() != 3 or not x.is_floating_point():
        raise HybridInputError(
            f"causal_conv1d takes floating-point x (batch, tokens, channels), found {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )
    batch, num_tokens, num_channels = x.shape
    check_taps("causal_conv1d", x, weight, bias, activation)
    wanted = (
        ("initial_state", initial_state, (batch, weight.shape[1] - 1, num_channels)),
        ("seq_ids", seq_ids, (batch, num_tokens)),
    )
    check_shapes("causal_conv1d", x, wanted)
    check_ids("causal_conv1d", seq_ids)
    if initial_state is not None and initial_state.dtype != x.dtype:
        raise HybridInputError(
            "causal_conv1d keeps inputs as they are: its initial_state has the dtype of x, found "
            f"{initial_state.dtype} and {x.dtype}"
        )


def check_taps(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Raise ``HybridInputError`` unless the convolution fits ``x`` (..., K)."""
    num_channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise HybridInputError(
            f"{name} of x {tuple(x.shape)} takes weight of shape ({num_channels}, taps) with at "
            f"least one tap, found {tuple(weight.shape)}"
        )
    wanted = (
        ("weight", weight, (num_channels, weight.shape[1])),
        ("bias", bias, (num_channels,)),
    )
    check_shapes(name, x, wanted)
    if activation not in ("silu", None):
        raise HybridInputError(f'{name} takes activation "silu" or None, found {activation!r}')
