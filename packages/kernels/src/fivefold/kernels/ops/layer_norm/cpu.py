"""``layer_norm`` in C++, see cpu.cpp: rows stay in the cache between the passes over them.

Legend: O outer, I inner, N values in a row; rows are (O, I).
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.layer_norm.rows import side_by_side

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """Dtypes that it has no code for, and machines where the file cannot be compiled."""
    rows = inputs[:2] if name == "layer_norm_backward" else inputs[:1]
    dtypes = {each.dtype for each in rows if isinstance(each, Tensor)}
    if len(dtypes) > 1 or not dtypes <= native.TYPES.keys():
        found = ", ".join(sorted(str(each) for each in dtypes))
        return f"its kernel takes rows of one dtype of float16 to float64, these are {found}"
    return native.refusal(SOURCE)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (O, I, N), mean and 1/std (O, I)."""
    x = side_by_side(x)
    wide = sum_dtype(x.dtype)
    y = torch.empty(tuple(x.shape), dtype=x.dtype)
    mean = torch.empty(tuple(x.shape[:2]), dtype=wide)
    rstd = torch.empty(tuple(x.shape[:2]), dtype=wide)
    native.call(
        native.load(SOURCE).layer_norm_forward,
        native.TYPES[x.dtype],
        x,
        _parameter(weight, wide),
        _parameter(bias, wide),
        y,
        mean,
        rstd,
        *x.shape,
        *x.stride()[:2],
        float(eps),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``; empty (0,) where absent."""
    dy, x = side_by_side(dy), side_by_side(x)
    width, num_threads = x.shape[2], torch.get_num_threads()
    dx = torch.empty(tuple(x.shape), dtype=x.dtype)
    # One row of sums for each thread; the first then holds the sum of all.
    sums = [
        None if parameter is None else torch.empty((num_threads, width), dtype=rstd.dtype)
        for parameter in (weight, bias)
    ]
    native.call(
        native.load(SOURCE).layer_norm_backward,
        native.TYPES[x.dtype],
        dy,
        x,
        _parameter(weight, rstd.dtype),
        mean.contiguous(),
        rstd.contiguous(),
        dx,
        *sums,
        *x.shape,
        *dy.stride()[:2],
        *x.stride()[:2],
        num_threads,
    )
    dweight, dbias = (
        x.new_empty(0) if partial is None or parameter is None else partial[0].to(parameter.dtype)
        for partial, parameter in zip(sums, (weight, bias), strict=True)
    )
    return dx, dweight, dbias


def _parameter(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype).contiguous()
