"""What ``grouped_mm`` takes: forms, dtypes, scales, and offsets where they can be seen."""

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def check(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype | None,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
) -> None:
    """Raise ``KernelInputError`` unless the operands fit together."""
    _check_shapes(mat_a, mat_b, offs)
    scaled = scale_a is not None and scale_b is not None
    float8 = mat_a.dtype in _FLOAT8 and mat_b.dtype in _FLOAT8
    if not (float8 or mat_a.dtype == mat_b.dtype) or not mat_a.is_floating_point():
        raise KernelInputError(
            f"grouped_mm takes operands of one floating-point dtype, or both in float8; found "
            f"{mat_a.dtype} and {mat_b.dtype}"
        )
    if (scale_a is None) != (scale_b is None) or (float8 and not scaled):
        raise KernelInputError(
            f"grouped_mm takes scale_a and scale_b, both with float8 operands and none without; "
            f"found {_named(scale_a)} and {_named(scale_b)} with {mat_a.dtype}"
        )
    if out_dtype is not None and (not out_dtype.is_floating_point or out_dtype.itemsize == 1):
        raise KernelInputError(f"grouped_mm makes floating-point values, was asked for {out_dtype}")
    if scale_a is not None and scale_b is not None:
        _check_scales(mat_a, mat_b, scale_a, scale_b)


def spans(offs: Tensor, size: int) -> list[tuple[int, int]]:
    """Start and end of each group, read from the device.

    Args:
        offs: (E,) ends.
        size: of the ragged dim.

    Raises:
        KernelInputError: the ends decrease or go past the ragged dim.
    """
    ends = offs.tolist()
    groups = list(zip([0, *ends], ends, strict=False))
    if any(start > end for start, end in groups) or ends[-1] > size:
        raise KernelInputError(
            f"grouped_mm takes offs that do not decrease, from 0 up to the {size} of the ragged "
            f"dim; found {ends}"
        )
    return groups


def _check_shapes(mat_a: Tensor, mat_b: Tensor, offs: Tensor) -> None:
    fits = {(2, 3), (2, 2), (3, 2)} >= {(mat_a.dim(), mat_b.dim())}
    fits = fits and mat_a.shape[-1] == mat_b.shape[-2]
    num_groups = next((mat.shape[0] for mat in (mat_a, mat_b) if mat.dim() == 3), offs.numel())
    fits = fits and offs.shape == (num_groups,) and num_groups > 0
    if not fits or offs.dtype != torch.int32:
        raise KernelInputError(
            "grouped_mm takes (T, K) x (E, K, N), (M, T) x (T, N) or (E, M, K) x (K, T), with offs "
            f"(E,) in torch.int32; found {tuple(mat_a.shape)} x {tuple(mat_b.shape)} with offs "
            f"{tuple(offs.shape)} in {offs.dtype}"
        )


def _check_scales(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    fits = mat_a.dim() == 2 and mat_b.dim() == 3
    fits = fits and _one_or(mat_a.shape[0], scale_a) and scale_a.dim() <= 1
    if not fits or not _one_or(mat_b.shape[0], scale_b) or scale_b.dim() > 1:
        raise KernelInputError(
            "grouped_mm takes scales for (T, K) x (E, K, N), one number or (T,) and one number or "
            f"(E,); found {tuple(mat_a.shape)} x {tuple(mat_b.shape)} with scale_a "
            f"{tuple(scale_a.shape)} and scale_b {tuple(scale_b.shape)}"
        )


def _named(scale: Tensor | None) -> str:
    return "none" if scale is None else f"a scale of shape {tuple(scale.shape)}"


def _one_or(count: int, scale: Tensor) -> bool:
    # Not `in`: torch.compile takes a number for no member where the members are symbols.
    return scale.numel() == 1 or scale.numel() == count
