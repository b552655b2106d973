"""The kernel that makes ``attention``'s results.

Letters as in ``operands``.
"""

import triton
import triton.language as tl

from fivefold.kernels.ops.attention.triton_parts import (
    INFINITY,
    LN_2,
    base_2,
    load_rows,
    place,
    seen,
    span,
    store_rows,
)
from fivefold.kernels.triton_parts import dot


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    bias_batch,
    bias_head,
    bias_query,
    bias_key,
    num_rows,
    num_heads,
    heads_per_key,
    num_queries,
    num_keys,
    band_start,
    band_end,
    scale_high,
    scale_low,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Results and log-sum-exps; a program owns a tile of queries."""
    num_tiles = tl.cdiv(num_queries, QUERIES)
    # The last queries see the most keys: they start first.
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    row, head = place(tl.program_id(0) // num_tiles, num_heads)
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + head // heads_per_key * k_head
    v_ptr += row * v_row + head // heads_per_key * v_head
    if bias_ptr is not None:
        bias_ptr += row // num_rows * bias_batch + head * bias_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = base_2(scale_high, scale_low, COMPUTE)
    q = load_rows(q_ptr, first, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
    queries = first + tl.arange(0, QUERIES)
    acc = tl.full((QUERIES, V_PADDED), 0, COMPUTE)
    top = tl.full((QUERIES,), -INFINITY, COMPUTE)
    total = tl.full((QUERIES,), 0, COMPUTE)

    low, before, resume, whole, cut, num_cut = span(
        first, QUERIES, num_keys, band_start, band_end, KEYS
    )
    for is_cut in tl.static_range(2):
        for step in tl.range(0 if is_cut else whole, num_cut if is_cut else cut):
            start = step * KEYS
            if is_cut:
                start = tl.where(step < before, low + step, resume + step) * KEYS
            k = load_rows(k_ptr, start, k_step, num_keys, KEYS, WIDTH, PADDED, is_cut)
            s = dot(q, tl.trans(k), tl.full((QUERIES, KEYS), 0, COMPUTE), PRECISION) * scale
            s = seen(
                s,
                queries[:, None],
                (start + tl.arange(0, KEYS))[None, :],
                bias_ptr,
                bias_query,
                bias_key,
                mask_ptr,
                num_queries,
                num_keys,
                band_start,
                band_end,
                is_cut,
            )
            new_top = tl.maximum(top, tl.max(s, 1))
            # What sees nothing yet has no largest score to subtract.
            shift = tl.where(new_top == -INFINITY, 0, new_top)
            p = tl.exp2(s - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(p, 1)
            v = load_rows(v_ptr, start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, is_cut)
            acc = dot(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
            top = new_top

    # A sum of 0 is one of nothing, whose log-sum-exp is that of ``top``: minus infinity.
    total = tl.where(total == 0, 1, total)
    acc = acc / total[:, None]
    store_rows(out_ptr, acc, row, head, first, num_heads, num_queries, QUERIES, V_WIDTH, V_PADDED)
    at = lse_ptr + (row * num_heads + head) * num_queries + queries
    tl.store(at, (top + tl.log2(total)) * LN_2, mask=queries < num_queries)
