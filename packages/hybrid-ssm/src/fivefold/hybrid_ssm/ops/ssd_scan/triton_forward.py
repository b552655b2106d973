"""The kernels of ``ssd_scan`` that make results, and what its gradients make again.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

import triton
import triton.language as tl

from fivefold.hybrid_ssm.ops.ssd_scan.triton_parts import clamped, left_over, raw_steps, softened
from fivefold.kernels.triton_parts import dot


@triton.jit
def decays_kernel(
    dt_ptr,
    bias_ptr,
    a_ptr,
    documents_ptr,
    decays_ptr,
    num_tokens,
    num_heads,
    dt_sequence,
    dt_token,
    dt_head,
    dt_min,
    dt_max,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Step sizes, and what decays leave: see ``launches``."""
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * CHUNK
    tokens = start + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_in = heads < num_heads
    inside = head_in[:, None] & (tokens < num_tokens)[None, :]
    at = dt_ptr + sequence * dt_sequence + tokens.to(tl.int64)[None, :] * dt_token
    at += heads[:, None] * dt_head
    dt = softened(raw_steps(at, bias_ptr, heads, inside, head_in, HAS_BIAS, COMPUTE), SOFTPLUS)
    # What is past the end takes no step.
    dt = tl.where(inside, clamped(dt, dt_min, dt_max), 0)
    log = dt * tl.load(a_ptr + heads, mask=head_in, other=0).to(COMPUTE)[:, None]
    # Differences of sums matter where they are small: the sums are kept in two parts.
    exact = tl.cumsum(log.to(tl.float64), axis=1)
    logs = exact.to(COMPUTE)
    left_from = tl.exp(logs)
    left_to = tl.exp((tl.sum(log.to(tl.float64), axis=1)[:, None] - exact).to(COMPUTE))
    if HAS_DOCUMENTS:
        row = documents_ptr + sequence * num_tokens
        last = tl.minimum(start + CHUNK, num_tokens) - 1
        document = tl.load(row + tl.minimum(tokens, last))
        # A sequence's first document goes on from the initial state.
        before = tl.load(row + tl.maximum(start - 1, 0))
        left_from = tl.where((document == before)[None, :], left_from, 0)
        left_to = tl.where((document == tl.load(row + last))[None, :], left_to, 0)
    width = chunks * CHUNK
    out = decays_ptr + (sequence * num_heads + heads)[:, None] * (5 * width) + tokens[None, :]
    mask = head_in[:, None] & (tokens < width)[None, :]
    tl.store(out, dt, mask=mask)
    tl.store(out + width, logs, mask=mask)
    tl.store(out + 2 * width, (exact - logs).to(COMPUTE), mask=mask)
    tl.store(out + 3 * width, left_from, mask=mask)
    tl.store(out + 4 * width, left_to, mask=mask)


@triton.jit
def states_kernel(
    x_ptr,
    b_ptr,
    decays_ptr,
    initial_ptr,
    states_ptr,
    final_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    x_sequence,
    x_token,
    b_sequence,
    b_token,
    HAS_INITIAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """Those before each chunk and the last, walking over the chunks."""
    index, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(num_tokens, CHUNK)
    sequence, head, width = index // num_heads, index % num_heads, chunks * CHUNK
    p, n = tl.arange(0, HEAD), tl.program_id(1) * STATE + tl.arange(0, STATE)
    p_in, n_in = p < head_dim, n < state_size
    inside = p_in[:, None] & n_in[None, :]
    place = p[:, None] * state_size + n[None, :]
    size = head_dim * state_size
    state = tl.zeros((HEAD, STATE), COMPUTE)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + index * size + place, mask=inside, other=0).to(COMPUTE)
    x_at = x_ptr + sequence * x_sequence + head * head_dim + p[:, None]
    b_at = b_ptr + sequence * b_sequence + (head // heads_in_group) * state_size + n[None, :]
    decays_ptr += index * (5 * width)
    for chunk in range(chunks):
        at = ((sequence * chunks + chunk) * num_heads + head) * size
        tl.store(states_ptr + at + place, state.to(states_ptr.dtype.element_ty), mask=inside)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        token_in = tokens < num_tokens
        far = tokens.to(tl.int64)
        x = tl.load(x_at + far[None, :] * x_token, mask=p_in[:, None] & token_in[None, :], other=0)
        b = tl.load(b_at + far[:, None] * b_token, mask=token_in[:, None] & n_in[None, :], other=0)
        scale = tl.load(decays_ptr + 4 * width + tokens) * tl.load(decays_ptr + tokens)
        across = tl.load(decays_ptr + 3 * width + (chunk * CHUNK + (CHUNK - 1)))
        scaled = (x.to(COMPUTE) * scale[None, :]).to(x.dtype)
        state = dot(scaled, b, state * across, PRECISION)
    tl.store(final_ptr + index * size + place, state, mask=inside)


@triton.jit
def cb_kernel(
    b_ptr,
    c_ptr,
    cb_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    b_sequence,
    b_token,
    c_sequence,
    c_token,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    STATE: tl.constexpr,
):
    """The products of C and B of each chunk."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk = index // chunks, index % chunks
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    token_in = tokens < num_tokens
    b_at = b_ptr + sequence * b_sequence + group * state_size + tokens[None, :] * b_token
    c_at = c_ptr + sequence * c_sequence + group * state_size + tokens[:, None] * c_token
    cb = tl.zeros((CHUNK, CHUNK), COMPUTE)
    for first in range(0, state_size, STATE):
        n = first + tl.arange(0, STATE)
        n_in = n < state_size
        c = tl.load(c_at + n[None, :], mask=token_in[:, None] & n_in[None, :], other=0)
        b = tl.load(b_at + n[:, None], mask=n_in[:, None] & token_in[None, :], other=0)
        cb = dot(c, b, cb, PRECISION)
    q = tl.arange(0, CHUNK)
    at = cb_ptr + (index * tl.num_programs(1) + group) * (CHUNK * CHUNK)
    tl.store(at + q[:, None] * CHUNK + q[None, :], cb)


@triton.jit
def scan_kernel(
    x_ptr,
    c_ptr,
    cb_ptr,
    states_ptr,
    decays_ptr,
    d_ptr,
    documents_ptr,
    y_ptr,
    num_tokens,
    num_heads,
    heads_in_group,
    head_dim,
    state_size,
    x_sequence,
    x_token,
    c_sequence,
    c_token,
    HAS_D: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    """The results, all chunks at once."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    group = head // heads_in_group
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    tokens = chunk * CHUNK + q
    token_in, p_in = tokens < num_tokens, p < head_dim
    inside = token_in[:, None] & p_in[None, :]
    decays = decays_ptr + (sequence * num_heads + head) * (5 * width) + tokens

    c_at = c_ptr + sequence * c_sequence + group * state_size + tokens[:, None] * c_token
    state_at = states_ptr + (index * num_heads + head) * (head_dim * state_size)
    y = tl.zeros((CHUNK, HEAD), COMPUTE)
    for first in range(0, state_size, STATE):
        n = first + tl.arange(0, STATE)
        n_in = n < state_size
        c = tl.load(c_at + n[None, :], mask=token_in[:, None] & n_in[None, :], other=0)
        place = p[None, :] * state_size + n[:, None]
        state = tl.load(state_at + place, mask=n_in[:, None] & p_in[None, :], other=0)
        y = dot(c, state, y, PRECISION)
    y *= tl.load(decays + 3 * width)[:, None]

    x_at = x_ptr + sequence * x_sequence + head * head_dim
    x = tl.load(x_at + tokens[:, None] * x_token + p[None, :], mask=inside, other=0)
    cb_at = cb_ptr + (index * (num_heads // heads_in_group) + group) * (CHUNK * CHUNK)
    left = left_over(decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, False)
    weights = left * tl.load(cb_at + q[:, None] * CHUNK + q[None, :]) * tl.load(decays)[None, :]
    y = dot(weights.to(x.dtype), x, y, PRECISION)
    if HAS_D:
        y += x.to(COMPUTE) * tl.load(d_ptr + head).to(COMPUTE)
    at = y_ptr + ((sequence * num_tokens + tokens) * num_heads + head)[:, None] * head_dim
    tl.store(at + p[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
