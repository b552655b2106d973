"""``grouped_mm`` in Triton: grouped matrix products that read the offsets on the device.

The products of rows are one persistent launch: how many tiles there are is only known on the
device, so every program counts them, and walks over its share.

Legend: T the ragged dim, E groups, K and M and N the others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import TensorCores, launch, num_sms, tensor_cores
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import dot, float32_precision


def refuses(name: str, *inputs: Any) -> str | None:
    """Dtypes that tensor cores do not take."""
    mat_a, mat_b = inputs[:2]
    if torch.float64 in (mat_a.dtype, mat_b.dtype) and not interpreting():
        return "its kernel has no float64 outside Triton's interpreter"
    if name != "grouped_mm_scaled":
        return None
    if mat_a.dtype.itemsize != 1:
        return f"its kernel takes scales of float8 operands, these are {mat_a.dtype}"
    if mat_a.is_cuda and torch.cuda.get_device_capability(mat_a.device) < (8, 9):
        return "float8 needs a GPU of compute capability 8.9 or more"
    return None


def grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(T, N)``: the rows of group e times ``mat_b[e]``, then zeros."""
    return _grouped_mm(_strided(mat_a), _strided(mat_b), offs, None, None, out_dtype)


def grouped_mm_scaled(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """``grouped_mm`` of float8 operands to divide by scales."""
    # Tensor cores take float8 with the summed dim innermost.
    mat_a, mat_b = mat_a.contiguous(), mat_b.mT.contiguous().mT
    return _grouped_mm(mat_a, mat_b, offs, scale_a, scale_b, out_dtype)


def grouped_outer(mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(E, M, N)``: the product over each group's part of T."""
    mat_a, mat_b = _strided(mat_a), _strided(mat_b)
    num_groups, height, width = offs.shape[0], mat_a.shape[0], mat_b.shape[1]
    out = torch.empty((num_groups, height, width), dtype=out_dtype, device=mat_a.device)
    tile = tile_of(height, width, mat_a.dtype, tensor_cores(mat_a))
    tiles = triton.cdiv(height, tile["ROWS"]) * triton.cdiv(width, tile["COLS"])
    launch(
        _grouped_outer_kernel,
        (num_groups * tiles,),
        mat_a,
        mat_b,
        out,
        offs,
        height,
        width,
        *mat_a.stride(),
        *mat_b.stride(),
        ACCUMULATOR=_accumulator(mat_a.dtype),
        PRECISION=float32_precision(),
        **tile,
    )
    return out


def zero_after(y: Tensor, offs: Tensor) -> None:
    """Zero the rows of ``y`` (T, N), contiguous, from ``offs[-1]`` on."""
    num_rows, width = y.shape
    tile = {"ROWS": 16, "COLS": min(1024, next_power_of_2(width))}
    grid = (triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(width, tile["COLS"]))
    launch(_zero_after_kernel, grid, y, offs, num_rows, width, offs.shape[0], **tile)


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    num_rows, inner = mat_a.shape
    num_groups, _, width = mat_b.shape
    out = torch.empty((num_rows, width), dtype=out_dtype, device=mat_a.device)
    height = num_rows // max(num_groups, 1)
    tile = tile_of(height, width, mat_a.dtype, tensor_cores(mat_a))
    # Every group may end with a tile that is not full.
    most_tiles = (num_rows // tile["ROWS"] + num_groups) * triton.cdiv(width, tile["COLS"])
    launch(
        _grouped_mm_kernel,
        (min(most_tiles, num_sms(mat_a)),),
        mat_a,
        mat_b,
        out,
        offs,
        scale_a,
        scale_b,
        inner,
        width,
        num_groups,
        *mat_a.stride(),
        *mat_b.stride(),
        SCALED=scale_a is not None,
        SCALE_OF_ROW=scale_a is not None and scale_a.numel() != 1,
        SCALE_OF_GROUP=scale_b is not None and scale_b.numel() != 1,
        GROUPS=next_power_of_2(num_groups),
        ACCUMULATOR=_accumulator(mat_a.dtype),
        PRECISION=float32_precision(),
        **tile,
    )
    zero_after(out, offs)
    return out


@triton.jit
def multiply(
    acc,
    a_at,
    b_at,
    row_in,
    col_in,
    inner,
    a_step,
    b_step,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """``acc`` plus a tile of a matrix product, summed over ``inner`` values, INNER at a time.

    ``a_at`` and ``b_at`` point to the first (ROWS, INNER) and (INNER, COLS) values of the
    operands, whose summed dim has the strides ``a_step`` and ``b_step``.
    """
    for start in range(0, inner, INNER):
        inner_in = tl.arange(0, INNER) + start < inner
        a = tl.load(a_at, mask=row_in[:, None] & inner_in[None, :], other=0.0)
        b = tl.load(b_at, mask=inner_in[:, None] & col_in[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        a_at += INNER * a_step
        b_at += INNER * b_step
    return acc


@triton.jit
def place(tile, tiles_down, tiles_across, BAND: tl.constexpr):
    """Row and column of a tile, walked in bands of BAND rows of tiles."""
    band = tile // (BAND * tiles_across)
    height = tl.minimum(tiles_down - band * BAND, BAND)
    within = tile % (BAND * tiles_across)
    return band * BAND + within % height, within // height


@triton.jit
def _tiles_of_groups(offs_ptr, num_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """How many tiles of ROWS rows each group has; 0 for those up to the power of two."""
    groups = tl.arange(0, GROUPS)
    ends = tl.load(offs_ptr + groups, mask=groups < num_groups, other=0)
    starts = tl.load(offs_ptr + groups - 1, mask=(groups > 0) & (groups < num_groups), other=0)
    lengths = ends - starts
    return tl.cdiv(lengths, ROWS)


@triton.jit
def _grouped_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    offs_ptr,
    scale_a_ptr,
    scale_b_ptr,
    inner,
    width,
    num_groups,
    a_row,
    a_inner,
    b_group,
    b_inner,
    b_col,
    SCALED: tl.constexpr,
    SCALE_OF_ROW: tl.constexpr,
    SCALE_OF_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    tiles_across = tl.cdiv(width, COLS)
    tiles_of_group = _tiles_of_groups(offs_ptr, num_groups, ROWS, GROUPS) * tiles_across
    tiles_up_to = tl.cumsum(tiles_of_group, 0)

    for tile in range(tl.program_id(0), tl.sum(tiles_of_group), tl.num_programs(0)):
        before = tiles_up_to <= tile
        group = tl.sum(before.to(tl.int32))
        start = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(offs_ptr + group)
        tile_of_group = tile - tl.sum(tl.where(before, tiles_of_group, 0))
        down, across = place(tile_of_group, tl.cdiv(end - start, ROWS), tiles_across, BAND)

        rows = start + down * ROWS + tl.arange(0, ROWS).to(tl.int64)
        cols = across * COLS + tl.arange(0, COLS).to(tl.int64)
        row_in, col_in = rows < end, cols < width
        along = tl.arange(0, INNER)
        a_at = a_ptr + rows[:, None] * a_row + along[None, :] * a_inner
        b_at = b_ptr + group.to(tl.int64) * b_group
        b_at = b_at + along[:, None] * b_inner + cols[None, :] * b_col
        acc = tl.zeros((ROWS, COLS), ACCUMULATOR)
        acc = multiply(acc, a_at, b_at, row_in, col_in, inner, a_inner, b_inner, PRECISION, INNER)
        if SCALED:
            scale_a = tl.load(scale_a_ptr)
            if SCALE_OF_ROW:
                scale_a = tl.load(scale_a_ptr + rows, mask=row_in, other=1)[:, None]
            scale_b = tl.load(scale_b_ptr)
            if SCALE_OF_GROUP:
                scale_b = tl.load(scale_b_ptr + group)
            # One after the other: their product may be out of range.
            acc = acc / scale_a / scale_b
        out_at = out_ptr + rows[:, None] * width + cols[None, :]
        inside = row_in[:, None] & col_in[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_outer_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    offs_ptr,
    height,
    width,
    a_row,
    a_inner,
    b_inner,
    b_col,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(height, ROWS), tl.cdiv(width, COLS)
    tiles = tiles_down * tiles_across
    group = tl.program_id(0) // tiles
    down, across = place(tl.program_id(0) % tiles, tiles_down, tiles_across, BAND)
    start = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
    length = tl.load(offs_ptr + group) - start

    rows = down * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = across * COLS + tl.arange(0, COLS).to(tl.int64)
    row_in, col_in = rows < height, cols < width
    along = start + tl.arange(0, INNER).to(tl.int64)
    a_at = a_ptr + rows[:, None] * a_row + along[None, :] * a_inner
    b_at = b_ptr + along[:, None] * b_inner + cols[None, :] * b_col
    acc = tl.zeros((ROWS, COLS), ACCUMULATOR)
    acc = multiply(acc, a_at, b_at, row_in, col_in, length, a_inner, b_inner, PRECISION, INNER)
    out_rows = group.to(tl.int64) * height + rows
    out_at = out_ptr + out_rows[:, None] * width + cols[None, :]
    inside = row_in[:, None] & col_in[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _zero_after_kernel(
    y_ptr, offs_ptr, num_rows, width, num_groups, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.load(offs_ptr + num_groups - 1)
    inside = ((rows >= first) & (rows < num_rows))[:, None] & (cols < width)[None, :]
    zero = tl.zeros((ROWS, COLS), y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * width + cols[None, :], zero, mask=inside)


def tile_of(
    height: int, width: int, dtype: torch.dtype, cores: TensorCores, num_sums: int = 1
) -> dict[str, int]:
    """Tile sizes and launch options of a matrix product.

    Small tiles in the interpreter, so that small tensors have several.

    Args:
        height: rows of the result, or of a usual group of them.
        width: columns of the result.
        dtype: of the operands.
        cores: of the device.
        num_sums: of a tile, in registers at once.

    Returns:
        ROWS and COLS of a tile, INNER values to sum at a time, and BAND: row tiles that are
        walked before the next column tile, so that both operands stay in the cache.
    """
    if interpreting():
        return {"ROWS": 16, "COLS": 16, "INNER": 16, "BAND": 2}
    # 128 bytes of each operand's row at a time: what tensor cores read without bank conflicts.
    shared = {"INNER": 128 // dtype.itemsize, "BAND": 8}
    if dtype.itemsize >= 4:
        return {"ROWS": 64, "COLS": 128, "num_warps": 8, "num_stages": 3} | shared
    if height <= 64:
        return {"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 4} | shared
    # Operands in registers leave no room for wider sums.
    if width <= 128 or num_sums > 1 or cores is TensorCores.REGISTERS:
        return {"ROWS": 128, "COLS": 128, "num_warps": 8, "num_stages": 4} | shared
    return {"ROWS": 128, "COLS": 256, "num_warps": 8, "num_stages": 3} | shared


def _strided(x: Tensor) -> Tensor:
    """Matrices whose rows or columns lie side by side, at any distance."""
    return x if 1 in x.stride()[-2:] else x.contiguous()


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
