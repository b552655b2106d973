"""Rotary position embedding, of whole heads or of their first values."""

from torch import Tensor

from fivefold.kernels.ops.rotary import op

__all__ = ["rotary"]


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    heads_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate pairs of a head's values by the angles of its position.

    ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. Computes in float32 (float64 for float64
    inputs) and rounds once, at the end. The gradient rotates back, so nothing of x is kept. Su et
    al., arXiv 2104.09864.

    Args:
        x: (..., T, H, D). Its first R values of each head are rotated, the others pass. Heads may
            lie at any distance in memory: queries in a packed projection are not copied.
        cos: (T, R/2), or (..., T, R/2) with the leading dims of x. The caller indexes it: row t is
            of the position of token t. A table of (T, R) whose halves are the same, as
            transformers has it, is given as ``cos[..., : R // 2]``.
        sin: like cos. Neither has a gradient.
        interleaved: pair the values 2i and 2i + 1 (GPT-J); the default pairs i and i + R/2
            (GPT-NeoX, Llama).
        heads_first: x is (..., H, T, D).
        backend: the default is the best there is.

    Returns:
        Like x, contiguous.

    Raises:
        KernelInputError: the inputs do not fit together, or cos or sin wants a gradient.

    >>> import torch
    >>> quarter_turn = torch.zeros(1, 1), torch.ones(1, 1)
    >>> rotary(torch.tensor([[[1.0, 2.0, 5.0]]]), *quarter_turn)
    tensor([[[-2.,  1.,  5.]]])
    """
    return op.apply(x, cos, sin, interleaved, heads_first, backend)
