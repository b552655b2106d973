"""The kernels of ``attention``'s gradients.

Letters as in ``operands``.
"""

import triton
import triton.language as tl

from fivefold.kernels.ops.attention.triton_parts import (
    INFINITY,
    LN_2,
    base_2,
    exponent,
    load_rows,
    place,
    seen,
    span,
    store_rows,
)
from fivefold.kernels.triton_parts import dot


@triton.jit
def dquery_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    dq_ptr,
    delta_ptr,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    dout_row,
    dout_head,
    dout_step,
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
    """The gradient of queries; a program owns a tile of them."""
    num_tiles = tl.cdiv(num_queries, QUERIES)
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    row, head = place(tl.program_id(0) // num_tiles, num_heads)
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + head // heads_per_key * k_head
    v_ptr += row * v_row + head // heads_per_key * v_head
    dout_ptr += row * dout_row + head * dout_head
    if bias_ptr is not None:
        bias_ptr += row // num_rows * bias_batch + head * bias_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = base_2(scale_high, scale_low, COMPUTE)
    q = load_rows(q_ptr, first, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
    dout = load_rows(dout_ptr, first, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, True)
    queries = first + tl.arange(0, QUERIES)
    in_length = queries < num_queries
    at = (row * num_heads + head) * num_queries + queries
    lse = tl.load(lse_ptr + at, mask=in_length, other=INFINITY)
    top = exponent(lse)

    out_ptr += (row * num_queries * num_heads + head) * V_WIDTH
    out = load_rows(
        out_ptr, first, num_heads * V_WIDTH, num_queries, QUERIES, V_WIDTH, V_PADDED, True
    )
    delta = tl.sum(dout.to(COMPUTE) * out.to(COMPUTE), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=in_length, other=0)
    # What sees nothing takes no gradient, and whatever reached its log-sum-exp goes nowhere.
    delta = tl.where(top == INFINITY, 0, delta)
    tl.store(delta_ptr + at, delta, mask=in_length)
    dq = tl.full((QUERIES, PADDED), 0, COMPUTE)

    low, before, resume, whole, cut, num_cut = span(
        first, QUERIES, num_keys, band_start, band_end, KEYS
    )
    for is_cut in tl.static_range(2):
        for step in tl.range(0 if is_cut else whole, num_cut if is_cut else cut):
            start = step * KEYS
            if is_cut:
                start = tl.where(step < before, low + step, resume + step) * KEYS
            k = load_rows(k_ptr, start, k_step, num_keys, KEYS, WIDTH, PADDED, is_cut)
            v = load_rows(v_ptr, start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, is_cut)
            zeros = tl.full((QUERIES, KEYS), 0, COMPUTE)
            s = dot(q, tl.trans(k), zeros, PRECISION) * scale
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
            p = tl.exp2(s - top[:, None])
            ds = p * (dot(dout, tl.trans(v), zeros, PRECISION) - delta[:, None])
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)

    dq *= scale * LN_2
    store_rows(dq_ptr, dq, row, head, first, num_heads, num_queries, QUERIES, WIDTH, PADDED)


@triton.jit
def dkey_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    dout_row,
    dout_head,
    dout_step,
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
    """The gradients of keys and values; a program owns a tile of them."""
    num_tiles = tl.cdiv(num_keys, KEYS)
    first = tl.program_id(0) % num_tiles * KEYS
    shared_heads = num_heads // heads_per_key
    row, shared = place(tl.program_id(0) // num_tiles, shared_heads)
    k_ptr += row * k_row + shared * k_head
    v_ptr += row * v_row + shared * v_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = base_2(scale_high, scale_low, COMPUTE)
    k = load_rows(k_ptr, first, k_step, num_keys, KEYS, WIDTH, PADDED, True)
    v = load_rows(v_ptr, first, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, True)
    dk = tl.full((KEYS, PADDED), 0, COMPUTE)
    dv = tl.full((KEYS, V_PADDED), 0, COMPUTE)

    # Keys i + start to i + end seen from the key's side: queries j - end to j - start.
    low, before, resume, whole, cut, num_cut = span(
        first,
        KEYS,
        num_queries,
        None if band_end is None else -band_end,
        None if band_start is None else -band_start,
        QUERIES,
    )
    for is_cut in tl.static_range(2):
        num_steps = num_cut if is_cut else tl.maximum(cut - whole, 0)
        # One loop over the heads that share the keys and over their queries: one pipeline.
        for step in tl.range(0, heads_per_key * num_steps):
            head = shared * heads_per_key + step // num_steps
            tile = step % num_steps
            start = (whole + tile) * QUERIES
            if is_cut:
                start = tl.where(tile < before, low + tile, resume + tile) * QUERIES
            queries = start + tl.arange(0, QUERIES)
            at = (row * num_heads + head) * num_queries + queries
            q_at = q_ptr + row * q_row + head * q_head
            q = load_rows(q_at, start, q_step, num_queries, QUERIES, WIDTH, PADDED, is_cut)
            dout_at = dout_ptr + row * dout_row + head * dout_head
            dout = load_rows(
                dout_at, start, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, is_cut
            )
            # A query that is not there has no probability anywhere.
            top = exponent(tl.load(lse_ptr + at, mask=queries < num_queries, other=INFINITY))
            delta = tl.load(delta_ptr + at, mask=queries < num_queries, other=0)
            zeros = tl.full((KEYS, QUERIES), 0, COMPUTE)
            s = dot(k, tl.trans(q), zeros, PRECISION) * scale
            bias_at = bias_ptr
            if bias_ptr is not None:
                bias_at += row // num_rows * bias_batch + head * bias_head
            s = seen(
                s,
                queries[None, :],
                (first + tl.arange(0, KEYS))[:, None],
                bias_at,
                bias_query,
                bias_key,
                mask_ptr,
                num_queries,
                num_keys,
                band_start,
                band_end,
                is_cut,
            )
            p = tl.exp2(s - top[None, :])
            dv = dot(p.to(dout.dtype), dout, dv, PRECISION)
            ds = p * (dot(v, tl.trans(dout), zeros, PRECISION) - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)

    dk *= scale * LN_2
    store_rows(dk_ptr, dk, row, shared, first, shared_heads, num_keys, KEYS, WIDTH, PADDED)
    store_rows(dv_ptr, dv, row, shared, first, shared_heads, num_keys, KEYS, V_WIDTH, V_PADDED)


@triton.jit
def dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    partial_ptr,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    dout_row,
    dout_head,
    dout_step,
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
    bias_heads,
    num_owners,
    num_steps,
    num_splits,
    SUM_HEADS: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Parts of the gradient of the bias; a program owns a tile of it."""
    # An owner is a tile of the bias; a step is one of the tiles of scores that share it.
    split, owner = tl.program_id(0) // num_owners, tl.program_id(0) % num_owners
    query_tiles, key_tiles = tl.cdiv(num_queries, QUERIES), tl.cdiv(num_keys, KEYS)
    own_keys = 1 if SUM_KEYS else key_tiles
    own_queries = 1 if SUM_QUERIES else query_tiles
    key_tile = owner % own_keys
    query_tile = owner // own_keys % own_queries
    head_batch = owner // own_keys // own_queries
    batch, head = place(head_batch, bias_heads)
    scale = base_2(scale_high, scale_low, COMPUTE)
    dbias = tl.full((QUERIES, KEYS), 0, COMPUTE)

    for step in range(split, num_steps, num_splits):
        rest = step
        if SUM_KEYS:
            key_tile = rest % key_tiles
            rest = rest // key_tiles
        if SUM_QUERIES:
            query_tile = rest % query_tiles
            rest = rest // query_tiles
        if SUM_HEADS:
            head = tl.cast(rest % num_heads, tl.int64)
            rest = rest // num_heads
        row = batch * num_rows + rest
        start, key_start = query_tile * QUERIES, key_tile * KEYS
        queries = start + tl.arange(0, QUERIES)
        q_at = q_ptr + row * q_row + head * q_head
        k_at = k_ptr + row * k_row + head // heads_per_key * k_head
        v_at = v_ptr + row * v_row + head // heads_per_key * v_head
        dout_at = dout_ptr + row * dout_row + head * dout_head
        bias_at = bias_ptr + batch * bias_batch + head * bias_head
        mask_at = mask_ptr
        if mask_ptr is not None:
            mask_at += row * num_keys
        q = load_rows(q_at, start, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
        k = load_rows(k_at, key_start, k_step, num_keys, KEYS, WIDTH, PADDED, True)
        v = load_rows(v_at, key_start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, True)
        dout = load_rows(dout_at, start, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, True)
        at = (row * num_heads + head) * num_queries + queries
        top = exponent(tl.load(lse_ptr + at, mask=queries < num_queries, other=INFINITY))
        delta = tl.load(delta_ptr + at, mask=queries < num_queries, other=0)
        zeros = tl.full((QUERIES, KEYS), 0, COMPUTE)
        s = dot(q, tl.trans(k), zeros, PRECISION) * scale
        s = seen(
            s,
            queries[:, None],
            (key_start + tl.arange(0, KEYS))[None, :],
            bias_at,
            bias_query,
            bias_key,
            mask_at,
            num_queries,
            num_keys,
            band_start,
            band_end,
            True,
        )
        p = tl.exp2(s - top[:, None])
        dbias += p * (dot(dout, tl.trans(v), zeros, PRECISION) - delta[:, None])

    to_queries = (query_tile * QUERIES + tl.arange(0, QUERIES))[:, None]
    to_keys = (key_tile * KEYS + tl.arange(0, KEYS))[None, :]
    if SUM_QUERIES:
        dbias = tl.sum(dbias, 0, keep_dims=True)
        to_queries = tl.zeros((1, 1), tl.int32)
    if SUM_KEYS:
        dbias = tl.sum(dbias, 1, keep_dims=True)
        to_keys = tl.zeros((1, 1), tl.int32)
    bias_queries = 1 if SUM_QUERIES else num_queries
    bias_keys = 1 if SUM_KEYS else num_keys
    num_biases = num_owners // own_keys // own_queries
    to_bias = (split.to(tl.int64) * num_biases + head_batch) * bias_queries + to_queries
    at = partial_ptr + to_bias * bias_keys + to_keys
    tl.store(at, dbias, mask=(to_queries < bias_queries) & (to_keys < bias_keys))
