"""The kernels of ``ssd_scan``'s gradients.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

import triton
import triton.language as tl

from fivefold.hybrid_ssm.ops.ssd_scan.triton_parts import (
    is_large,
    left_over,
    raw_steps,
    softened,
    store_for_next,
)
from fivefold.kernels.triton_parts import dot, sigmoid


@triton.jit
def dstates_kernel(
    dy_ptr,
    c_ptr,
    decays_ptr,
    dfinal_ptr,
    states_ptr,
    dstates_ptr,
    dinitial_ptr,
    past_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    dy_sequence,
    dy_token,
    c_sequence,
    c_token,
    HAS_FINAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """Those after each chunk, walking back; dinitial; what of the loss passes each chunk."""
    index, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(num_tokens, CHUNK)
    sequence, head, width = index // num_heads, index % num_heads, chunks * CHUNK
    p, n = tl.arange(0, HEAD), tl.program_id(1) * STATE + tl.arange(0, STATE)
    p_in, n_in = p < head_dim, n < state_size
    inside = p_in[:, None] & n_in[None, :]
    place = p[:, None] * state_size + n[None, :]
    size = head_dim * state_size
    dstate = tl.zeros((HEAD, STATE), COMPUTE)
    if HAS_FINAL:
        dstate = tl.load(dfinal_ptr + index * size + place, mask=inside, other=0).to(COMPUTE)
    dy_at = dy_ptr + sequence * dy_sequence + head * head_dim + p[:, None]
    c_at = c_ptr + sequence * c_sequence + (head // heads_in_group) * state_size + n[None, :]
    left_at = decays_ptr + index * (5 * width) + 3 * width
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = ((sequence * chunks + chunk) * num_heads + head) * size
        tl.store(dstates_ptr + at + place, dstate.to(dstates_ptr.dtype.element_ty), mask=inside)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        token_in = tokens < num_tokens
        far = tokens.to(tl.int64)
        dstate *= tl.load(left_at + (chunk * CHUNK + (CHUNK - 1)))
        before = tl.load(states_ptr + at + place, mask=inside, other=0).to(COMPUTE)
        passed = tl.sum(tl.sum(dstate * before, axis=1), axis=0)
        past_at = past_ptr + (index * chunks + chunk) * tl.num_programs(1)
        tl.store(past_at + tl.program_id(1), passed)
        dy_in = p_in[:, None] & token_in[None, :]
        dy = tl.load(dy_at + far[None, :] * dy_token, mask=dy_in, other=0)
        c = tl.load(c_at + far[:, None] * c_token, mask=token_in[:, None] & n_in[None, :], other=0)
        scaled = (dy.to(COMPUTE) * tl.load(left_at + tokens)[None, :]).to(dy.dtype)
        dstate = dot(scaled, c, dstate, PRECISION)
    dinitial = dstate.to(dinitial_ptr.dtype.element_ty)
    tl.store(dinitial_ptr + index * size + place, dinitial, mask=inside)


@triton.jit
def dx_kernel(
    dy_ptr,
    x_ptr,
    b_ptr,
    cb_ptr,
    dstates_ptr,
    decays_ptr,
    d_ptr,
    documents_ptr,
    dx_ptr,
    sums_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    dy_sequence,
    dy_token,
    x_sequence,
    x_token,
    b_sequence,
    b_token,
    HAS_D: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """Of x; the sums that step sizes, keeping and skipping get."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    group = head // heads_in_group
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    tokens = chunk * CHUNK + q
    token_in, p_in = tokens < num_tokens, p < head_dim
    inside = token_in[:, None] & p_in[None, :]
    decays = decays_ptr + (sequence * num_heads + head) * (5 * width) + tokens

    b_at = b_ptr + sequence * b_sequence + group * state_size + tokens[:, None] * b_token
    state_at = dstates_ptr + (index * num_heads + head) * (head_dim * state_size)
    du = tl.zeros((CHUNK, HEAD), COMPUTE)
    for first in range(0, state_size, STATE):
        n = first + tl.arange(0, STATE)
        n_in = n < state_size
        b = tl.load(b_at + n[None, :], mask=token_in[:, None] & n_in[None, :], other=0)
        place = p[None, :] * state_size + n[:, None]
        dstate = tl.load(state_at + place, mask=n_in[:, None] & p_in[None, :], other=0)
        du = dot(b, dstate, du, PRECISION)
    du *= tl.load(decays + 4 * width)[:, None]
    x_at = x_ptr + sequence * x_sequence + head * head_dim
    x = tl.load(x_at + tokens[:, None] * x_token + p[None, :], mask=inside, other=0).to(COMPUTE)
    steps = tl.load(decays)
    sums = sums_ptr + (sequence * num_heads + head) * (SUMS * width) + tokens
    store_for_next(sums + width, tl.sum(x * du, axis=1) * steps, CHUNK)

    dy_at = dy_ptr + sequence * dy_sequence + head * head_dim
    dy = tl.load(dy_at + tokens[:, None] * dy_token + p[None, :], mask=inside, other=0)
    cb_at = cb_ptr + (index * (num_heads // heads_in_group) + group) * (CHUNK * CHUNK)
    left = left_over(decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, True)
    weights = left * tl.load(cb_at + q[None, :] * CHUNK + q[:, None])
    du = dot(weights.to(dy.dtype), dy, du, PRECISION)
    wide_dy = dy.to(COMPUTE)
    tl.store(sums, tl.sum(x * du, axis=1))
    tl.store(sums + 2 * width, tl.sum(x * wide_dy, axis=1))
    dx = du * steps[:, None]
    if HAS_D:
        dx += wide_dy * tl.load(d_ptr + head).to(COMPUTE)
    at = dx_ptr + ((sequence * num_tokens + tokens) * num_heads + head)[:, None] * head_dim
    tl.store(at + p[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dcb_kernel(
    dy_ptr,
    x_ptr,
    cb_ptr,
    decays_ptr,
    documents_ptr,
    dcb_ptr,
    sums_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    dy_sequence,
    dy_token,
    x_sequence,
    x_token,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Of the products of C and B; what passes between the tokens of a chunk."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    tokens = chunk * CHUNK + q
    token_in, p_in = tokens < num_tokens, p < head_dim
    pairs = (index * tl.num_programs(1) + group) * (CHUNK * CHUNK)
    pairs += q[:, None] * CHUNK + q[None, :]
    dcb = tl.zeros((CHUNK, CHUNK), COMPUTE)
    for member in range(heads_in_group):
        head = group * heads_in_group + member
        decays = decays_ptr + (sequence * num_heads + head) * (5 * width) + tokens
        sums = sums_ptr + (sequence * num_heads + head) * (SUMS * width) + tokens
        dy_at = dy_ptr + sequence * dy_sequence + head * head_dim + tokens[:, None] * dy_token
        dy = tl.load(dy_at + p[None, :], mask=token_in[:, None] & p_in[None, :], other=0)
        x_at = x_ptr + sequence * x_sequence + head * head_dim + tokens[None, :] * x_token
        x = tl.load(x_at + p[:, None], mask=p_in[:, None] & token_in[None, :], other=0)
        left = left_over(
            decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, False
        )
        met = dot(dy, x, tl.zeros((CHUNK, CHUNK), COMPUTE), PRECISION)
        met *= left * tl.load(decays)[None, :]
        dcb += met
        # What passes between a token and the next: from tokens up to it to those after it.
        earlier_pair = q[:, None] > q[None, :]
        passing = tl.cumsum(met * tl.load(cb_ptr + pairs), axis=1)
        passing = tl.where(earlier_pair, passing, 0)
        store_for_next(sums + 3 * width, tl.sum(passing, axis=0), CHUNK)
    tl.store(dcb_ptr + pairs, dcb.to(dcb_ptr.dtype.element_ty))


@triton.jit
def dc_kernel(
    dy_ptr,
    b_ptr,
    c_ptr,
    dcb_ptr,
    states_ptr,
    decays_ptr,
    dc_ptr,
    sums_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    dy_sequence,
    dy_token,
    b_sequence,
    b_token,
    c_sequence,
    c_token,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """Of C; what tokens take of the state before the chunk."""
    index, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    n = part * STATE + tl.arange(0, STATE)
    tokens = chunk * CHUNK + q
    token_in, p_in, n_in = tokens < num_tokens, p < head_dim, n < state_size
    inside = token_in[:, None] & n_in[None, :]
    c_at = c_ptr + sequence * c_sequence + group * state_size + tokens[:, None] * c_token
    dc = tl.zeros((CHUNK, STATE), COMPUTE)
    for member in range(heads_in_group):
        head = group * heads_in_group + member
        decays = decays_ptr + (sequence * num_heads + head) * (5 * width) + tokens
        sums = sums_ptr + (sequence * num_heads + head) * (SUMS * width) + tokens
        dy_at = dy_ptr + sequence * dy_sequence + head * head_dim + tokens[:, None] * dy_token
        dy = tl.load(dy_at + p[None, :], mask=token_in[:, None] & p_in[None, :], other=0)
        state_at = states_ptr + (index * num_heads + head) * (head_dim * state_size)
        place = p[:, None] * state_size + n[None, :]
        state = tl.load(state_at + place, mask=p_in[:, None] & n_in[None, :], other=0)
        earlier = dot(dy, state, tl.zeros((CHUNK, STATE), COMPUTE), PRECISION)
        earlier *= tl.load(decays + 3 * width)[:, None]
        dc += earlier
        c = tl.load(c_at + n[None, :], mask=inside, other=0).to(COMPUTE)
        tl.store(sums + (4 + part) * width, tl.sum(c * earlier, axis=1))
    at = (index * tl.num_programs(1) + group) * (CHUNK * CHUNK)
    dcb = tl.load(dcb_ptr + at + q[:, None] * CHUNK + q[None, :])
    b_at = b_ptr + sequence * b_sequence + group * state_size + tokens[:, None] * b_token
    b = tl.load(b_at + n[None, :], mask=inside, other=0)
    dc = dot(dcb, b, dc, PRECISION)
    out = (sequence * num_tokens + tokens) * tl.num_programs(1) + group
    out = dc_ptr + out[:, None] * state_size + n[None, :]
    tl.store(out, dc.to(dc_ptr.dtype.element_ty), mask=inside)


@triton.jit
def db_kernel(
    x_ptr,
    c_ptr,
    dcb_ptr,
    dstates_ptr,
    decays_ptr,
    db_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    x_sequence,
    x_token,
    c_sequence,
    c_token,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """Of B."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    n = tl.program_id(2) * STATE + tl.arange(0, STATE)
    tokens = chunk * CHUNK + q
    token_in, p_in, n_in = tokens < num_tokens, p < head_dim, n < state_size
    inside = token_in[:, None] & n_in[None, :]
    db = tl.zeros((CHUNK, STATE), COMPUTE)
    for member in range(heads_in_group):
        head = group * heads_in_group + member
        decays = decays_ptr + (sequence * num_heads + head) * (5 * width) + tokens
        x_at = x_ptr + sequence * x_sequence + head * head_dim + tokens[:, None] * x_token
        x = tl.load(x_at + p[None, :], mask=token_in[:, None] & p_in[None, :], other=0)
        state_at = dstates_ptr + (index * num_heads + head) * (head_dim * state_size)
        place = p[:, None] * state_size + n[None, :]
        dstate = tl.load(state_at + place, mask=p_in[:, None] & n_in[None, :], other=0)
        scale = tl.load(decays + 4 * width) * tl.load(decays)
        later = dot(x, dstate, tl.zeros((CHUNK, STATE), COMPUTE), PRECISION)
        db += later * scale[:, None]
    at = (index * tl.num_programs(1) + group) * (CHUNK * CHUNK)
    dcb = tl.load(dcb_ptr + at + q[None, :] * CHUNK + q[:, None])
    c_at = c_ptr + sequence * c_sequence + group * state_size + tokens[:, None] * c_token
    c = tl.load(c_at + n[None, :], mask=inside, other=0)
    db = dot(dcb, c, db, PRECISION)
    out = (sequence * num_tokens + tokens) * tl.num_programs(1) + group
    out = db_ptr + out[:, None] * state_size + n[None, :]
    tl.store(out, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit
def ddt_kernel(
    dt_ptr,
    bias_ptr,
    a_ptr,
    decays_ptr,
    sums_ptr,
    past_ptr,
    ddt_ptr,
    da_ptr,
    dbias_ptr,
    num_tokens,
    num_heads,
    dt_sequence,
    dt_token,
    dt_head,
    dt_min,
    dt_max,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
    PAST: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of the step sizes; parts of those of A and the bias."""
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    width, tokens = chunks * CHUNK, chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_in = heads < num_heads
    inside = head_in[:, None] & (tokens < num_tokens)[None, :]
    index = sequence * num_heads + heads
    # Heads that there are not are those of the last one, and stored nowhere.
    known = tl.minimum(heads, num_heads - 1)
    known_index = sequence * num_heads + known
    sums = sums_ptr + known_index[:, None] * (SUMS * width) + tokens[None, :]
    # What passes this token: taken by it or later ones from the state before the chunk, put in by
    # earlier ones and kept for later chunks, put in by earlier ones and taken by it or later ones.
    taken = tl.zeros((HEADS, CHUNK), COMPUTE)
    for part in tl.static_range(4, SUMS):
        taken += tl.load(sums + part * width)
    dlog = tl.cumsum(taken, axis=1, reverse=True)
    dlog += tl.cumsum(tl.load(sums + width), axis=1)
    dlog += tl.load(sums + 3 * width)
    for part in tl.static_range(PAST):
        past_at = past_ptr + (known_index * chunks + chunk) * PAST + part
        dlog += tl.load(past_at)[:, None]
    a = tl.load(a_ptr + known).to(COMPUTE)
    dsteps = tl.load(sums) + dlog * a[:, None]
    steps_at = decays_ptr + known_index[:, None] * (5 * width) + tokens[None, :]
    da = tl.sum(dlog * tl.load(steps_at), axis=1)
    tl.store(da_ptr + index * chunks + chunk, da, mask=head_in)

    at = dt_ptr + sequence * dt_sequence + tokens.to(tl.int64)[None, :] * dt_token
    at += heads[:, None] * dt_head
    dt = raw_steps(at, bias_ptr, heads, inside, head_in, HAS_BIAS, COMPUTE)
    soft = softened(dt, SOFTPLUS)
    ddt = tl.where((soft >= dt_min) & (soft <= dt_max) & inside, dsteps, 0)
    if SOFTPLUS:
        ddt = tl.where(is_large(dt), ddt, ddt * sigmoid(dt))
    tl.store(dbias_ptr + index * chunks + chunk, tl.sum(ddt, axis=1), mask=head_in)
    out = ddt_ptr + (sequence * num_tokens + tokens)[None, :] * num_heads + heads[:, None]
    tl.store(out, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
