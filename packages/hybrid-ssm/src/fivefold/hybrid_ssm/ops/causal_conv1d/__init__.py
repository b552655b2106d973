"""Causal convolution of each channel by itself."""

from torch import Tensor

from fivefold.hybrid_ssm.ops.causal_conv1d import op

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own taps, of which the last meets the token itself.

    ``y[t] = act(bias + Σ_k weight[k] x[t - W + 1 + k])``: what stands before Mamba-2's scan.
    Computes in float32 (float64 for float64 ``x``) and rounds once. With B batch, S tokens, K
    channels and W taps:

    Args:
        x: (B, S, K).
        weight: (K, W).
        bias: (K,); the default is none.
        activation: "silu" or None.
        initial_state: (B, W - 1, K), the inputs before the first token; the default is zeros.
        seq_ids: integers (B, S), the same in all tokens of a document and different in the next
            one's: no document sees another. ``initial_state`` belongs to the first, the final
            state to the last.
        return_final_state: whether to return the last W - 1 inputs too.
        backend: the default is the best there is.

    Returns:
        ``y`` like x, or ``y`` and the final state (B, W - 1, K), like x.

    Raises:
        HybridInputError: the tensors do not fit together.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    >>> causal_conv1d(x, torch.tensor([[10.0, 1.0]]), activation=None).flatten()
    tensor([ 1., 12., 23.])
    """
    y, final_state = op.apply(x, weight, bias, activation, initial_state, seq_ids, backend)
    return (y, final_state) if return_final_state else y
