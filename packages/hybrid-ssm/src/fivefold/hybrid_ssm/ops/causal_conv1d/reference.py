"""The specification of ``causal_conv1d`` in plain PyTorch, and its gradient written out.

Legend: B batch, S tokens, K channels, W taps, I inputs: W - 1 before the first token, and S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result (B, S, K) and the final state (B, W - 1, K)."""
    inputs_bik = _inputs(x, weight, initial_state)
    sees = _sees(documents, weight.shape[1])
    y_bsk = _before_activation(inputs_bik, weight, bias, sees)
    y = (F.silu(y_bsk) if silu else y_bsk).to(x.dtype)
    num_tokens, kept = x.shape[1], weight.shape[1] - 1
    final_bik = inputs_bik[:, num_tokens:]
    if documents is not None and num_tokens:
        final_bik = final_bik * _in_last_document(documents, kept)
    return y, final_bik.to(x.dtype, copy=True)


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
    num_tokens, num_taps = x.shape[1], weight.shape[1]
    inputs_bik = _inputs(x, weight, initial_state)
    sees = _sees(documents, num_taps)
    dy_bsk = dy.to(inputs_bik.dtype)
    if silu:
        y_bsk = _before_activation(inputs_bik, weight, bias, sees)
        logistic = torch.sigmoid(y_bsk)
        dy_bsk = dy_bsk * logistic * (1 + y_bsk * (1 - logistic))

    dinputs_bik = torch.zeros_like(inputs_bik)
    dweight = torch.zeros_like(weight, dtype=inputs_bik.dtype)
    for tap in range(num_taps):
        seen = dy_bsk if sees is None else dy_bsk * sees[tap]
        dweight[:, tap] = (seen * inputs_bik[:, tap : tap + num_tokens]).sum((0, 1))
        dinputs_bik[:, tap : tap + num_tokens] += seen * weight[:, tap].to(seen.dtype)
    if dfinal_state is not None:
        dfinal = dfinal_state.to(dinputs_bik.dtype)
        if documents is not None and num_tokens:
            dfinal = dfinal * _in_last_document(documents, num_taps - 1)
        dinputs_bik[:, num_tokens:] += dfinal

    dinitial_bik, dx = dinputs_bik[:, : num_taps - 1], dinputs_bik[:, num_taps - 1 :]
    return (
        dx.to(x.dtype, copy=True),
        dweight.to(weight.dtype),
        x.new_empty(0) if bias is None else dy_bsk.sum((0, 1)).to(bias.dtype),
        x.new_empty(0)
        if initial_state is None
        else dinitial_bik.to(initial_state.dtype, copy=True),
    )


def _inputs(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The inputs with those before the first token, (B, I, K)."""
    x_bsk = x.to(torch.promote_types(x.dtype, torch.float32))
    if initial_state is None:
        return F.pad(x_bsk, (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([initial_state.to(x_bsk.dtype), x_bsk], 1)


def _sees(documents: Tensor | None, num_taps: int) -> list[Tensor] | None:
    """For each tap whether what it meets is of the token's document, (B, S, 1)."""
    if documents is None:
        return None
    num_tokens = documents.shape[1]
    # What comes before the first token belongs to the first document.
    documents_bi = F.pad(documents, (num_taps - 1, 0))
    return [
        (documents_bi[:, tap : tap + num_tokens] == documents).unsqueeze(-1)
        for tap in range(num_taps)
    ]


def _before_activation(
    inputs_bik: Tensor, weight: Tensor, bias: Tensor | None, sees: list[Tensor] | None
) -> Tensor:
    num_taps = weight.shape[1]
    num_tokens = inputs_bik.shape[1] - num_taps + 1
    y_bsk = inputs_bik.new_zeros(inputs_bik.shape[0], num_tokens, inputs_bik.shape[2])
    for tap in range(num_taps):
        met = inputs_bik[:, tap : tap + num_tokens] * weight[:, tap].to(inputs_bik.dtype)
        y_bsk = y_bsk + (met if sees is None else met * sees[tap])
    return y_bsk if bias is None else y_bsk + bias.to(y_bsk.dtype)


def _in_last_document(documents: Tensor, kept: int) -> Tensor:
    """Whether each of the last ``kept`` inputs is of the last document, (B, W - 1, 1)."""
    documents_bi = F.pad(documents, (kept, 0))
    return (documents_bi[:, documents.shape[1] :] == documents[:, -1:]).unsqueeze(-1)
