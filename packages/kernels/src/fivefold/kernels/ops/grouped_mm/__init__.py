"""Matrix products of groups of rows, each group with a matrix of its own: the experts' hot path."""

import torch
from torch import Tensor

from fivefold.kernels.ops.grouped_mm import op

__all__ = ["grouped_mm"]


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor,
    out_dtype: torch.dtype | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply group by group, as ``torch.nn.functional.grouped_mm``, in any sizes and strides.

    ``offs`` says where each group of the ragged dim T ends; what comes after the last group
    belongs to none. Three forms:

    * (T, K) x (E, K, N): the rows of group e times matrix e, (T, N). Rows of no group are zero.
    * (M, T) x (T, N): for each group the product over its part of T, (E, M, N): the gradient of
      the matrices above. Zero for an empty group.
    * (E, M, K) x (K, T): matrix e times the columns of group e, (M, T). Columns of no group are
      zero.

    Both operands get gradients, by the same ops and so to any order; a row of no group gets zero,
    a matrix of an empty group too, also where T is 0. Follows autocast like a linear layer.

    Args:
        mat_a: the left operand.
        mat_b: the right operand, of mat_a's dtype. Transposed operands such as ``weight.mT`` are
            not copied.
        offs: (E,) int32, non-decreasing, up to T. Checked where it lies on the CPU; on a GPU that
            would wait for the device.
        out_dtype: the default is the operands' dtype, bfloat16 for float8. Sums are made in
            float32 (float64 for float64) in any case.
        scale_a: what float8 rows were multiplied with, as ``fp8_quantize`` returns it: one number
            or one for each row (T,), float32. Only the first form takes float8, whose result has
            no gradient.
        scale_b: the same for matrices, one number or (E,).
        backend: the default is the best there is.

    Raises:
        KernelInputError: the shapes, dtypes, scales or offs do not fit together.

    >>> import torch
    >>> x, weight = torch.ones(3, 2), torch.ones(2, 4, 2)
    >>> grouped_mm(x, weight.mT, offs=torch.tensor([1, 3], dtype=torch.int32)).shape
    torch.Size([3, 4])
    """
    return op.apply(mat_a, mat_b, offs, out_dtype, scale_a, scale_b, backend)
