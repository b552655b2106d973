"""One token of the causal convolution: what generation does at each step."""

from torch import Tensor

from fivefold.hybrid_ssm.ops.conv_update import op

__all__ = ["conv_update", "conv_update_"]


def conv_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``causal_conv1d`` of one token from a state; has gradients.

    Args:
        state: (B, W - 1, K), the inputs before, stays as it is.
        x: (B, K).
        weight: (K, W).
        bias: (K,); the default is none.
        activation: "silu" or None.
        backend: the default is the best there is.

    Returns:
        ``y`` like x, and the new state, like state.

    Raises:
        HybridInputError: the tensors do not fit together.

    >>> import torch
    >>> state, x = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0]])
    >>> y, state = conv_update(state, x, torch.tensor([[100.0, 10.0, 1.0]]), activation=None)
    >>> y.item(), state.flatten()
    (123.0, tensor([2., 3.]))
    """
    return op.apply(state, x, weight, bias, activation, backend)


def conv_update_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """``conv_update`` that writes the new state over the old one and returns ``y``.

    Raises:
        HybridInputError: the tensors do not fit together, or one of them requires a gradient.
    """
    return op.apply_(state, x, weight, bias, activation, backend)
