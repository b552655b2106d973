"""``attention`` in Triton: scores live a tile at a time in registers (FlashAttention-2).

A program owns a tile of queries (results, their gradient) or of keys (gradients of key and value)
and walks the tiles of the other side that the band lets it see: first those that the band's start
cuts, then those that nothing cuts, then those that its end or the length cuts. Exponents are to
base 2. The bias's gradient has a kernel of its own, in which a program owns a tile of the bias and
walks all that share it: no atomics, so results repeat bit for bit. Letters as in ``operands``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import launch, num_sms
from fivefold.kernels.ops.attention import tiles
from fivefold.kernels.ops.attention.operands import Call, by_position
from fivefold.kernels.ops.attention.shapes import rows_of
from fivefold.kernels.triton_parts import dot

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INFINITY = tl.constexpr(float("inf"))


def refuses(name: str, *inputs: object) -> str | None:
    """Widths that registers do not hold, and float64 on a GPU, which has no such tensor cores."""
    operands = inputs[2:5] if name == "attention_backward" else inputs[:3]
    query, _, value = (x for x in operands if isinstance(x, Tensor))
    widest = max(query.shape[-1], value.shape[-1])
    if widest > tiles.WIDEST:
        return f"its kernels take widths of up to {tiles.WIDEST}, this is {widest}"
    if query.dtype == torch.float64 and not interpreting():
        return "its kernels take float32, bfloat16 and float16, this is float64"
    return None


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result (B, R, H, Tq, Dv) and the log-sum-exp of the scores (B, R, H, Tq)."""
    call = Call(query, key, value, bias, key_mask, (band_start, band_end), scale)
    out = by_position(query, value.shape[-1])
    lse = torch.empty(query.shape[:-1], dtype=call.wide, device=query.device)
    tile = tiles.forward(query.shape[3], call.widest, query.dtype)
    launch(
        _forward_kernel,
        (triton.cdiv(query.shape[3], tile.queries) * lse.shape[:3].numel(),),
        *(*call.operands, out, lse, *call.strides, *call.bias_strides, *call.numbers),
        **call.constants,
        **tile.constants(),
    )
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    band_start: int | None,
    band_end: int | None,
    scale: float,
    wants_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, that of bias empty (0,) where not wanted."""
    call = Call(query, key, value, bias, key_mask, (band_start, band_end), scale)
    out, lse, dout = out.transpose(2, 3).contiguous(), lse.contiguous(), rows_of(dout)
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    dquery, dkey, dvalue = (by_position(x, x.shape[-1]) for x in (query, key, value))
    numbers = (*call.strides, *dout.stride()[:3], *call.bias_strides, *call.numbers)

    tile = tiles.dquery(query.shape[3], call.widest, query.dtype)
    launch(
        _dquery_kernel,
        (triton.cdiv(query.shape[3], tile.queries) * lse.shape[:3].numel(),),
        *(*call.operands, out, lse, dout, dlse, dquery, delta, *numbers),
        **call.constants,
        **tile.constants(),
    )
    tile = tiles.dkey(key.shape[3], call.widest, query.dtype)
    launch(
        _dkey_kernel,
        (triton.cdiv(key.shape[3], tile.keys) * key.shape[:3].numel(),),
        *(*call.operands, lse, dout, delta, dkey, dvalue, *numbers),
        **call.constants,
        **tile.constants(),
    )
    if bias is None or not wants_dbias:
        return dquery, dkey, dvalue, query.new_empty(0)

    tile = tiles.dbias(call.widest, query.dtype)
    walk = tiles.walk(bias.shape, query.shape, key.shape[3], tile)
    splits = walk.splits(num_sms(query))
    partial = torch.empty((splits, *bias.shape), dtype=call.wide, device=query.device)
    launch(
        _dbias_kernel,
        (splits * walk.owners,),
        *(*call.operands, lse, dout, delta, partial, *numbers),
        *(bias.shape[1], walk.owners, walk.steps, splits),
        **walk.constants(),
        **call.constants,
        **tile.constants(),
    )
    return dquery, dkey, dvalue, partial.sum(0).to(bias.dtype)


@triton.jit
def _forward_kernel(
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
    num_tiles = tl.cdiv(num_queries, QUERIES)
    # The last queries see the most keys: they start first.
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    row, head = _place(tl.program_id(0) // num_tiles, num_heads)
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + head // heads_per_key * k_head
    v_ptr += row * v_row + head // heads_per_key * v_head
    if bias_ptr is not None:
        bias_ptr += row // num_rows * bias_batch + head * bias_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = _base_2(scale_high, scale_low, COMPUTE)
    q = _load(q_ptr, first, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
    queries = first + tl.arange(0, QUERIES)
    acc = tl.full((QUERIES, V_PADDED), 0, COMPUTE)
    top = tl.full((QUERIES,), -_INFINITY, COMPUTE)
    total = tl.full((QUERIES,), 0, COMPUTE)

    low, before, resume, whole, cut, num_cut = _span(
        first, QUERIES, num_keys, band_start, band_end, KEYS
    )
    for is_cut in tl.static_range(2):
        for step in tl.range(0 if is_cut else whole, num_cut if is_cut else cut):
            start = step * KEYS
            if is_cut:
                start = tl.where(step < before, low + step, resume + step) * KEYS
            k = _load(k_ptr, start, k_step, num_keys, KEYS, WIDTH, PADDED, is_cut)
            s = dot(q, tl.trans(k), tl.full((QUERIES, KEYS), 0, COMPUTE), PRECISION) * scale
            s = _seen(
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
            shift = tl.where(new_top == -_INFINITY, 0, new_top)
            p = tl.exp2(s - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(p, 1)
            v = _load(v_ptr, start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, is_cut)
            acc = dot(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
            top = new_top

    # A sum of 0 is one of nothing, whose log-sum-exp is that of ``top``: minus infinity.
    total = tl.where(total == 0, 1, total)
    acc = acc / total[:, None]
    _store(out_ptr, acc, row, head, first, num_heads, num_queries, QUERIES, V_WIDTH, V_PADDED)
    at = lse_ptr + (row * num_heads + head) * num_queries + queries
    tl.store(at, (top + tl.log2(total)) * _LN_2, mask=queries < num_queries)


@triton.jit
def _dquery_kernel(
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
    num_tiles = tl.cdiv(num_queries, QUERIES)
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    row, head = _place(tl.program_id(0) // num_tiles, num_heads)
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + head // heads_per_key * k_head
    v_ptr += row * v_row + head // heads_per_key * v_head
    dout_ptr += row * dout_row + head * dout_head
    if bias_ptr is not None:
        bias_ptr += row // num_rows * bias_batch + head * bias_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = _base_2(scale_high, scale_low, COMPUTE)
    q = _load(q_ptr, first, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
    dout = _load(dout_ptr, first, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, True)
    queries = first + tl.arange(0, QUERIES)
    in_length = queries < num_queries
    at = (row * num_heads + head) * num_queries + queries
    lse = tl.load(lse_ptr + at, mask=in_length, other=_INFINITY)
    top = _exponent(lse)

    out_ptr += (row * num_queries * num_heads + head) * V_WIDTH
    out = _load(out_ptr, first, num_heads * V_WIDTH, num_queries, QUERIES, V_WIDTH, V_PADDED, True)
    delta = tl.sum(dout.to(COMPUTE) * out.to(COMPUTE), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=in_length, other=0)
    # What sees nothing takes no gradient, and whatever reached its log-sum-exp goes nowhere.
    delta = tl.where(top == _INFINITY, 0, delta)
    tl.store(delta_ptr + at, delta, mask=in_length)
    dq = tl.full((QUERIES, PADDED), 0, COMPUTE)

    low, before, resume, whole, cut, num_cut = _span(
        first, QUERIES, num_keys, band_start, band_end, KEYS
    )
    for is_cut in tl.static_range(2):
        for step in tl.range(0 if is_cut else whole, num_cut if is_cut else cut):
            start = step * KEYS
            if is_cut:
                start = tl.where(step < before, low + step, resume + step) * KEYS
            k = _load(k_ptr, start, k_step, num_keys, KEYS, WIDTH, PADDED, is_cut)
            v = _load(v_ptr, start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, is_cut)
            zeros = tl.full((QUERIES, KEYS), 0, COMPUTE)
            s = dot(q, tl.trans(k), zeros, PRECISION) * scale
            s = _seen(
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

    dq *= scale * _LN_2
    _store(dq_ptr, dq, row, head, first, num_heads, num_queries, QUERIES, WIDTH, PADDED)


@triton.jit
def _dkey_kernel(
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
    num_tiles = tl.cdiv(num_keys, KEYS)
    first = tl.program_id(0) % num_tiles * KEYS
    shared_heads = num_heads // heads_per_key
    row, shared = _place(tl.program_id(0) // num_tiles, shared_heads)
    k_ptr += row * k_row + shared * k_head
    v_ptr += row * v_row + shared * v_head
    if mask_ptr is not None:
        mask_ptr += row * num_keys
    scale = _base_2(scale_high, scale_low, COMPUTE)
    k = _load(k_ptr, first, k_step, num_keys, KEYS, WIDTH, PADDED, True)
    v = _load(v_ptr, first, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, True)
    dk = tl.full((KEYS, PADDED), 0, COMPUTE)
    dv = tl.full((KEYS, V_PADDED), 0, COMPUTE)

    # Keys i + start to i + end seen from the key's side: queries j - end to j - start.
    low, before, resume, whole, cut, num_cut = _span(
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
            q = _load(q_at, start, q_step, num_queries, QUERIES, WIDTH, PADDED, is_cut)
            dout_at = dout_ptr + row * dout_row + head * dout_head
            dout = _load(dout_at, start, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, is_cut)
            # A query that is not there has no probability anywhere.
            top = _exponent(tl.load(lse_ptr + at, mask=queries < num_queries, other=_INFINITY))
            delta = tl.load(delta_ptr + at, mask=queries < num_queries, other=0)
            zeros = tl.full((KEYS, QUERIES), 0, COMPUTE)
            s = dot(k, tl.trans(q), zeros, PRECISION) * scale
            bias_at = bias_ptr
            if bias_ptr is not None:
                bias_at += row // num_rows * bias_batch + head * bias_head
            s = _seen(
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

    dk *= scale * _LN_2
    _store(dk_ptr, dk, row, shared, first, shared_heads, num_keys, KEYS, WIDTH, PADDED)
    _store(dv_ptr, dv, row, shared, first, shared_heads, num_keys, KEYS, V_WIDTH, V_PADDED)


@triton.jit
def _dbias_kernel(
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
    # An owner is a tile of the bias; a step is one of the tiles of scores that share it.
    split, owner = tl.program_id(0) // num_owners, tl.program_id(0) % num_owners
    query_tiles, key_tiles = tl.cdiv(num_queries, QUERIES), tl.cdiv(num_keys, KEYS)
    own_keys = 1 if SUM_KEYS else key_tiles
    own_queries = 1 if SUM_QUERIES else query_tiles
    key_tile = owner % own_keys
    query_tile = owner // own_keys % own_queries
    head_batch = owner // own_keys // own_queries
    batch, head = _place(head_batch, bias_heads)
    scale = _base_2(scale_high, scale_low, COMPUTE)
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
        q = _load(q_at, start, q_step, num_queries, QUERIES, WIDTH, PADDED, True)
        k = _load(k_at, key_start, k_step, num_keys, KEYS, WIDTH, PADDED, True)
        v = _load(v_at, key_start, v_step, num_keys, KEYS, V_WIDTH, V_PADDED, True)
        dout = _load(dout_at, start, dout_step, num_queries, QUERIES, V_WIDTH, V_PADDED, True)
        at = (row * num_heads + head) * num_queries + queries
        top = _exponent(tl.load(lse_ptr + at, mask=queries < num_queries, other=_INFINITY))
        delta = tl.load(delta_ptr + at, mask=queries < num_queries, other=0)
        zeros = tl.full((QUERIES, KEYS), 0, COMPUTE)
        s = dot(q, tl.trans(k), zeros, PRECISION) * scale
        s = _seen(
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


@triton.jit
def _place(head_row, num_heads):
    """Row and head of the so-many-th head of a tensor (rows, heads, ...), in 64 bits."""
    head_row = tl.cast(head_row, tl.int64)
    return head_row // num_heads, head_row % num_heads


@triton.jit
def _base_2(scale_high, scale_low, COMPUTE: tl.constexpr):
    """The scale that makes exponents to base 2 of products."""
    return (tl.cast(scale_high, COMPUTE) + tl.cast(scale_low, COMPUTE)) * _LOG2_E


@triton.jit
def _exponent(lse):
    """A log-sum-exp to base 2; where nothing is seen, what makes every probability 0."""
    return tl.where(lse == -_INFINITY, _INFINITY, lse * _LOG2_E)


@triton.jit
def _span(
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
def _seen(
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
        s += bias.to(s.dtype) * _LOG2_E
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + keys, mask=keys < num_keys, other=0)
        s = tl.where(kept != 0, s, -_INFINITY)
    if CUT:
        s = tl.where(keys < num_keys, s, -_INFINITY)
        if band_start is not None:
            s = tl.where(keys - queries >= band_start, s, -_INFINITY)
        if band_end is not None:
            s = tl.where(keys - queries <= band_end, s, -_INFINITY)
    return s


@triton.jit
def _load(
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
def _store(
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
