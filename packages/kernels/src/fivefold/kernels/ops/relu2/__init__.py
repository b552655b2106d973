"""Squared ReLU, the activation of Primer's and Nemotron's feed-forward layers."""

from torch import Tensor

from fivefold.kernels.ops.relu2 import op

__all__ = ["relu2"]


def relu2(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Square what is positive: ``relu(x)²``, rounded once.

    Keeps only its input for the gradient, ``2 relu(x)``. So et al., arXiv 2109.08668.

    Args:
        input: of any shape.
        backend: the default is the best there is.

    Returns:
        Like input, contiguous.

    Raises:
        KernelInputError: input is not floating-point.

    >>> import torch
    >>> relu2(torch.tensor([-2.0, 3.0]))
    tensor([0., 9.])
    """
    return op.apply(input, backend)
