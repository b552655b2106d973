"""``fp8_quantize`` in Triton: the largest magnitude of each program's tiles, then scale and cast.

Magnitudes are compared as integers, whose order is that of floats with NaN above infinity; the
order of programs changes nothing. Each program of the second kernel reduces what the first left.

Legend: R rows, C columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import launch, num_sms
from fivefold.kernels.ops.fp8_quantize.reference import SMALLEST_AMAX
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator

# Programs for each multiprocessor, and the most there are: their results are reduced in one load.
_PROGRAMS_PER_SM, _MOST_PROGRAMS = 4, 1024

# The interpreter truncates when it casts to float8, and NaN becomes a number.
_INTERPRETED = tl.constexpr(interpreting())
_NAN, _SIGN = tl.constexpr(0x7F), tl.constexpr(-0x80000000)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)


def refuses(name: str, *inputs: Any) -> str | None:
    """GPUs that cannot cast to float8."""
    x = inputs[0]
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "float8 needs a GPU of compute capability 8.9 or more"
    return None


def fp8_quantize(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float8 values (R, C), their transpose (C, R) or an empty (0,), and the scale ()."""
    num_rows, num_columns = x.shape
    x_fp8 = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    x_t = torch.empty((num_columns, num_rows) if transposed else (0,), dtype=dtype, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.is_contiguous() and not transposed:
        x = x.reshape(1, -1)
    tile = _tile(x.shape[1], transposed)
    tiles = triton.cdiv(x.shape[0], tile["ROWS"]) * triton.cdiv(x.shape[1], tile["COLS"])
    # A power of two, as blocks of values are; one without tiles leaves 0.
    programs = next_power_of_2(min(tiles, _PROGRAMS_PER_SM * num_sms(x), _MOST_PROGRAMS))
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    partial = torch.empty((programs,), dtype=bits, device=x.device)
    sizes = (x.shape[0], x.shape[1], x.stride(0))
    shared = {"COMPUTE": accumulator(x.dtype), "num_warps": 8, **tile}
    launch(_amax_kernel, (programs,), x, partial, *sizes, **shared)
    launch(
        _cast_kernel,
        (programs,),
        x,
        partial,
        x_fp8,
        x_t,
        scale,
        *sizes,
        LARGEST=torch.finfo(dtype).max,
        POWER_OF_2=power_of_2,
        TRANSPOSED=transposed,
        PROGRAMS=programs,
        **shared,
    )
    return x_fp8, x_t, scale


@triton.jit
def _amax_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    x_stride,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_across = tl.cdiv(num_columns, COLS)
    tiles = tl.cdiv(num_rows, ROWS) * tiles_across
    amax = tl.zeros((ROWS, COLS), partial_ptr.dtype.element_ty)
    for tile in range(program, tiles, tl.num_programs(0)):
        rows = (tile // tiles_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = (tile % tiles_across).to(tl.int64) * COLS + tl.arange(0, COLS)
        inside = (rows < num_rows)[:, None] & (cols < num_columns)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0)
        magnitude = tl.abs(x.to(COMPUTE)).to(partial_ptr.dtype.element_ty, bitcast=True)
        amax = tl.maximum(amax, magnitude)
    tl.store(partial_ptr + program, tl.max(tl.max(amax, axis=1), axis=0))


@triton.jit
def _cast_kernel(
    x_ptr,
    partial_ptr,
    out_ptr,
    transposed_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    x_stride,
    LARGEST: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    bits = tl.load(partial_ptr + tl.arange(0, PROGRAMS))
    scale = _scale(tl.max(bits, axis=0).to(COMPUTE, bitcast=True), LARGEST, POWER_OF_2)
    if program == 0:
        tl.store(scale_ptr, scale)

    tiles_across = tl.cdiv(num_columns, COLS)
    tiles = tl.cdiv(num_rows, ROWS) * tiles_across
    for done in range(program, tiles, PROGRAMS):
        # From the end: what the first kernel read last is still in the cache.
        tile = tiles - 1 - done
        rows = (tile // tiles_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = (tile % tiles_across).to(tl.int64) * COLS + tl.arange(0, COLS)
        inside = (rows < num_rows)[:, None] & (cols < num_columns)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0)
        x = _to_float8(x.to(tl.float32) * scale, out_ptr.dtype.element_ty, LARGEST)
        tl.store(out_ptr + rows[:, None] * num_columns + cols[None, :], x, mask=inside)
        if TRANSPOSED:
            at = transposed_ptr + cols[:, None] * num_rows + rows[None, :]
            tl.store(at, tl.trans(x), mask=tl.trans(inside))


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, POWER_OF_2: tl.constexpr):
    """In float64, then rounded; NaN stays."""
    smallest = tl.full((), _SMALLEST_AMAX, tl.float64)
    amax = tl.maximum(amax.to(tl.float64), smallest, propagate_nan=tl.PropagateNan.ALL)
    scale = (LARGEST / amax).to(tl.float32)
    if POWER_OF_2:
        # The logarithm is rounded to float32 before the floor, as torch's is.
        exponent = tl.floor(tl.log2(scale.to(tl.float64)).to(tl.float32))
        scale = tl.exp2(exponent.to(tl.float64)).to(tl.float32)
    return scale


@triton.jit
def _to_float8(x, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """To nearest even, saturated; NaN stays."""
    x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if _INTERPRETED:
        if tl.float8e4nv == DTYPE:
            rounded = _to_grid(x, 3, -6)
        else:
            rounded = _to_grid(x, 2, -14)
        x_fp8 = rounded.to(DTYPE).to(tl.uint8, bitcast=True)
        return (x_fp8 | _NAN * (x != x).to(tl.uint8)).to(DTYPE, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _to_grid(x, MANTISSA: tl.constexpr, SMALLEST_EXPONENT: tl.constexpr):
    """To the nearest float32 that float8 has too, by a sum that drops the other bits."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 255) - 127, SMALLEST_EXPONENT)
    # 1.5 * 2^23 steps: there a float32 has no fractions of a step.
    large = 1.5 * tl.exp2((exponent - MANTISSA + 23).to(tl.float32))
    rounded = (tl.abs(x) + large - large).to(tl.int32, bitcast=True)
    return (rounded | (bits & _SIGN)).to(tl.float32, bitcast=True)


def _tile(num_columns: int, transposed: bool) -> dict[str, int]:
    """Broad tiles; nearly square ones where both orders are written, for runs of many bytes.

    Small ones in the interpreter, so that small tensors have several.
    """
    if transposed:
        return {"ROWS": 8, "COLS": 16} if interpreting() else {"ROWS": 128, "COLS": 64}
    values = 128 if interpreting() else 8192
    cols = min(values, next_power_of_2(num_columns))
    return {"ROWS": values // cols, "COLS": cols}
