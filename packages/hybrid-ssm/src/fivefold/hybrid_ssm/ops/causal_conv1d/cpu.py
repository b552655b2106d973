"""``causal_conv1d`` in C++, see cpu.cpp: some channels at a time over all tokens.

Legend: B batch, S tokens, K channels, W taps.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """Dtypes that it does not know, and machines where the file cannot be compiled."""
    x = inputs[0]
    if isinstance(x, Tensor) and x.dtype not in native.TYPES:
        return f"its kernel takes float16 to float64, this is {x.dtype}"
    return native.refusal(SOURCE)


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result (B, S, K) and the final state (B, W - 1, K)."""
    x, compute = _rows(x), torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype)
    final_state = torch.empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=x.dtype)
    native.call(
        native.load(SOURCE).causal_conv1d_forward,
        native.TYPES[x.dtype],
        *x.shape,
        weight.shape[1],
        x,
        *x.stride()[:2],
        weight.mT.to(compute).contiguous(),
        None if bias is None else bias.to(compute).contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        None if documents is None else documents.contiguous(),
        silu,
        y,
        final_state,
        torch.get_num_threads(),
    )
    return y, final_state


def causal_conv1d_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    dy, x, compute = _rows(dy), _rows(x), torch.promote_types(x.dtype, torch.float32)
    batch, _, num_channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    # One sum for each sequence.
    dweight = torch.empty((batch, weight.shape[1], num_channels), dtype=compute)
    dbias = torch.empty((batch, num_channels), dtype=compute)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=x.dtype)
    native.call(
        native.load(SOURCE).causal_conv1d_backward,
        native.TYPES[x.dtype],
        *x.shape,
        weight.shape[1],
        dy,
        *dy.stride()[:2],
        None if dfinal_state is None else dfinal_state.contiguous(),
        x,
        *x.stride()[:2],
        weight.mT.to(compute).contiguous(),
        None if bias is None else bias.to(compute).contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        None if documents is None else documents.contiguous(),
        silu,
        dx,
        dweight,
        dbias,
        dinitial,
        torch.get_num_threads(),
    )
    return (
        dx,
        dweight.sum(0).mT.to(weight.dtype).contiguous(),
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
        x.new_empty(0) if dinitial is None else dinitial,
    )


def _rows(x: Tensor) -> Tensor:
    """(B, S, K) whose channels lie side by side."""
    return x if x.stride(2) == 1 else x.contiguous()
