"""``fp8_quantize`` as a registered op: shapes for tracing, checks.

Legend: R rows, C columns.
"""

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@define("fivefold_kernels", backends=("triton", "cuda", "reference"))
def fp8_quantize(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, transposed: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (R, C) to float8 (R, C), its transpose (C, R) in memory of its own, and the scale ().

    The transpose is for matrix products that take their operands in one order alone; it is an
    empty (0,) unless ``transposed``.
    """
    num_rows, num_columns = x.shape
    return (
        x.new_empty(num_rows, num_columns, dtype=dtype),
        x.new_empty((num_columns, num_rows) if transposed else (0,), dtype=dtype),
        x.new_empty((), dtype=torch.float32),
    )


def apply(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """See ``fp8_quantize``: check, make rows, run, restore the shape."""
    check(x, dtype)
    rows = x.detach().reshape(-1, x.shape[-1] if x.dim() and x.numel() else 1)
    x_fp8, _, scale = fp8_quantize(rows, dtype, power_of_2, False, backend)
    return x_fp8.reshape(x.shape), scale


def check(x: Tensor, dtype: torch.dtype) -> None:
    """Raise ``KernelInputError`` unless ``x`` can be quantised to ``dtype``."""
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise KernelInputError(
            f"fp8_quantize takes values of 2, 4 or 8 bytes in floating point, found {x.dtype}"
        )
    if dtype not in DTYPES:
        raise KernelInputError(
            f"fp8_quantize makes {' or '.join(map(str, DTYPES))}, was asked for {dtype}"
        )
