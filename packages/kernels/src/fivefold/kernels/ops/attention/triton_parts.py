"""What the kernels of ``attention`` share: places, tiles that a tile sees, scores.

Letters as in ``operands``.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def place(head_row, num_heads):
    """Row and head of the so-many-th head of a tensor (rows, heads, ...), in 64 bits."""
    head_row = tl.cast(head_row, tl.int64)
    return head_row // num_heads, head_row % num_heads


@triton.jit
def base_2(scale_high, scale_low, COMPUTE: tl.constexpr):
    """The scale that makes exponents to base 2 of products."""
    return (tl.cast(scale_high, COMPUTE) + tl.cast(scale_low, COMPUTE)) * LOG2_E


@triton.jit
def exponent(lse):
    """A log-sum-exp to base 2; where nothing is seen, what makes every probability 0."""
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2_E)


@triton.jit
def span(
    first,
    SIZE: tl.constexpr,
    length,
    band_start,
    band_end,
    STEP: tl.constexpr,
):
    """Which tiles of ``STEP`` on the other side a tile from ``first`` on sees, by number.

    Nothing cuts those from whole to cut. Of the num_cut tiles that the band or the length cuts,
    the first ``before`` are low + i, the others resume + i.
    """
    low, whole, cut, high = 0, 0, length, length
    if band_start is not None:
        low = tl.maximum(first + band_start, 0) // STEP
        whole = tl.cdiv(tl.maximum(first + SIZE - 1 + band_start, 0), STEP)
    if band_end is not None:
        cut = tl.minimum(length, tl.maximum(first + band_end + 1, 0))
        high = tl.minimum(length, first + SIZE + band_end)
    cut, high = cut // STEP, tl.cdiv(high, STEP)
    before = tl.maximum(tl.minimum(whole, high) - low, 0)
    resume = tl.maximum(whole, cut)
    num_cut = before + tl.maximum(high - resume, 0)
    return low, before, resume - before, whole, cut, num_cut


@triton.jit
def seen(
    s,
    queries,
    keys,
    bias_ptr,
    bias_query,
    bias_key,
    mask_ptr,
    num_queries,
    num_keys,
    band_start,
    band_end,
    CUT: tl.constexpr,
):
    """Scores with the bias added, and minus infinity where a query does not see a key.

    Queries and keys are numbers that broadcast to the tile; only a ``CUT`` tile may have any that
    the band or the lengths hide.
    """
    if bias_ptr is not None:
        at = bias_ptr + queries.to(tl.int64) * bias_query + keys * bias_key
        bias = tl.load(at, mask=(queries < num_queries) & (keys < num_keys), other=0)
        s += bias.to(s.dtype) * LOG2_E
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + keys, mask=keys < num_keys, other=0)
        s = tl.where(kept != 0, s, -INFINITY)
    if CUT:
        s = tl.where(keys < num_keys, s, -INFINITY)
        if band_start is not None:
            s = tl.where(keys - queries >= band_start, s, -INFINITY)
        if band_end is not None:
            s = tl.where(keys - queries <= band_end, s, -INFINITY)
    return s


@triton.jit
def load_rows(
    ptr,
    first,
    step,
    length,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CUT: tl.constexpr,
):
    """Positions ``first`` to ``first + SIZE`` of one head; zeros past the length and the width."""
    steps, cols = tl.arange(0, SIZE), tl.arange(0, PADDED)
    # Far in 64 bits, near in 32: the pointers of a tile are cheap.
    at = ptr + tl.cast(first, tl.int64) * step + (steps[:, None] * step + cols[None, :])
    inside = (first + steps < length)[:, None] & (cols < WIDTH)[None, :]
    if CUT or WIDTH != PADDED:
        return tl.load(at, mask=inside, other=0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(
    ptr,
    x,
    row,
    head,
    first,
    num_heads,
    length,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write positions ``first`` to ``first + SIZE`` of a head to (B, R, T, heads, width)."""
    steps, cols = tl.arange(0, SIZE), tl.arange(0, PADDED)
    position = row * length + first + steps
    at = ptr + (position[:, None] * num_heads + head) * WIDTH + cols[None, :]
    inside = (first + steps < length)[:, None] & (cols < WIDTH)[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)
