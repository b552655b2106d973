"""Linear layers by the fastest matrix product that torch has for the device at hand."""

from torch import Tensor

from fivefold.kernels.ops.linear import op

__all__ = ["linear"]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``torch.nn.functional.linear``, which it is but on CPUs that MKL runs slowly.

    MKL, behind torch's float32 products, uses AVX-512 on Intel's CPUs only; oneDNN, which torch
    brings as well, uses it on AMD's, where it is twice as fast. Result and gradients are products
    of that kind there, and can be differentiated to any order. A few rows without gradients, as
    when a model decodes, are products in C++ there, which read weights twice as fast as MKL and
    oneDNN do, in bfloat16 too. Follows autocast.

    Args:
        input: (..., K).
        weight: (N, K), in any strides.
        bias: (N,).
        backend: ``aten`` for oneDNN, ``cpu`` for C++, ``reference`` for
            ``torch.nn.functional.linear``; the default is the fastest.

    Returns:
        (..., N).

    Raises:
        KernelInputError: a backend is named, and the operands do not fit together. Without one the
            errors are torch's.

    >>> import torch
    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])
    """
    return op.apply(input, weight, bias, backend)
