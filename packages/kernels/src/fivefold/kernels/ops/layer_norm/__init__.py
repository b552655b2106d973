"""Layer normalisation of rows that may lie anywhere in memory."""

from collections.abc import Sequence

from torch import Tensor

from fivefold.kernels.ops.layer_norm import op

__all__ = ["layer_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, with the biased variance.

    Computes in float32 (float64 for float64 inputs) and rounds once, at the end. Ba, Kiros and
    Hinton, arXiv 1607.06450. Values of the last dims have to lie side by side; a tensor whose
    other dims were transposed, such as AlphaFold's pair representation, is read where it lies.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: sizes of the last dims, normalised together.
        weight: of ``normalized_shape``; the default is ones.
        bias: of ``normalized_shape``; the default is zeros.
        eps: added to the variance.
        backend: the default is the best there is.

    Returns:
        Like input, without gaps.

    Raises:
        KernelInputError: the shapes do not fit together.

    >>> import torch
    >>> layer_norm(torch.tensor([1.0, 3.0]), (2,), eps=0.0)
    tensor([-1.,  1.])
    """
    return op.apply(input, tuple(normalized_shape), weight, bias, eps, backend)
