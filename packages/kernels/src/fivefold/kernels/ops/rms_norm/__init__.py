"""Root-mean-square normalisation, plain, and gated and grouped as Mamba-2 has it."""

from collections.abc import Sequence

from torch import Tensor

from fivefold.kernels.ops.rms_norm import op

__all__ = ["rms_norm"]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    gate: Tensor | None = None,
    gate_first: bool = True,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide by the root of the mean square: ``x / sqrt(mean(x²) + eps) * weight``.

    Computes in float32 (float64 for float64 inputs) and rounds once, at the end. Zhang and
    Sennrich, arXiv 1910.07467; the gated form is Mamba-2's, arXiv 2405.21060.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: sizes of the last dims, normalised together.
        weight: of ``normalized_shape``; the default is ones.
        eps: the default is the machine epsilon of input's dtype, as in torch.
        gate: like input. With ``gate_first`` it is ``rms_norm(x * silu(gate))``, else
            ``rms_norm(x) * silu(gate)``.
        gate_first: see gate.
        group_size: normalise each group of so many consecutive values by itself; the default is
            all of ``normalized_shape``, which it must divide.
        backend: the default is the best there is.

    Returns:
        Like input.

    Raises:
        KernelInputError: the shapes do not fit together.

    >>> import torch
    >>> rms_norm(torch.tensor([3.0, 4.0]), (2,), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    shape = tuple(normalized_shape)
    return op.apply(input, shape, weight, eps, gate, gate_first, group_size, backend)
