"""SwiGLU: the gated activation of most transformers' feed-forward layers and experts."""

from torch import Tensor

from fivefold.kernels.ops.swiglu import op

__all__ = ["swiglu"]


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gate one half of a projection by the other: ``silu(gate) * up``.

    Computes in float32 (float64 for float64 inputs) and rounds once, at the end. Keeps only its
    inputs for the gradient. Shazeer, arXiv 2002.05202.

    Args:
        gate: (..., F); or (..., 2F), which holds gate and then up, if ``up`` is not given. Its
            gradient then comes back in one tensor too.
        up: like gate.
        row_scale: (...), multiplied into each row: a router's weight of a token at an expert.
        backend: the default is the best there is.

    Rows may lie at any distance in memory: halves of one packed tensor are not copied.

    Returns:
        (..., F) in gate's dtype, contiguous.

    Raises:
        KernelInputError: the shapes, dtypes or devices do not fit together.

    >>> import torch
    >>> swiglu(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0]))
    tensor([ 0.7311, -0.5379])
    """
    return op.apply(gate, up, row_scale, backend)
