"""``ssd_scan`` in Triton: a chunk of tokens is one tile, and its products run on tensor cores.

Forward: step sizes and decays; the states before each chunk, one program a head walking over the
chunks with the state in registers; the products of C and B of each group; the results, all chunks
at once. Backward runs the first three again, walks back with the gradients of the states, and then
takes all chunks at once: for x, for C and for B, and for the logarithms of the decays.

A decay's logarithm gets what passes from before a token to it or after it, as a sum of just that:
differences of larger sums would drown it.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

# ruff: noqa: N806 - the paper's names A, B, C and D

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.launches import Call, Kernels, chunk_of, rows
from fivefold.hybrid_ssm.ops.ssd_scan.reference import Gradients
from fivefold.kernels.backends import interpreting
from fivefold.kernels.triton_parts import accumulator, dot, float32_precision, sigmoid

# The values of a head are one tile.
_WIDEST_HEAD = 128


def refuses(name: str, *inputs: object) -> str | None:
    """Heads that do not fit a tile, and float64, which tensor cores do not take."""
    x = inputs[2] if name == "ssd_scan_backward" else inputs[0]
    assert isinstance(x, Tensor)
    if x.dtype == torch.float64 and not interpreting():
        return "its kernels have no float64 outside Triton's interpreter"
    if x.shape[3] > _WIDEST_HEAD:
        return f"its kernels take heads of up to {_WIDEST_HEAD} values, these have {x.shape[3]}"
    return None


def ssd_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    limits = (dt_softplus, dt_min, dt_max)
    call = _call(x, dt, A, B, C, D, dt_bias, documents, limits, chunk_size, 128)
    decays = call.decays()
    states, final_state = call.states(decays, initial_state)
    return call.scan(decays, states, call.cb()), final_state


def ssd_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    limits = (dt_softplus, dt_min, dt_max)
    # Smaller chunks than forward: three tiles of pairs of tokens are in registers at once.
    call = _call(x, dt, A, B, C, D, dt_bias, documents, limits, chunk_size, 64)
    dy, decays, cb, sums = rows(dy.to(x.dtype)), call.decays(), call.cb(), call.sums()
    states, last = call.states(decays, initial_state)
    dinitial = last if initial_state is None else torch.empty_like(initial_state).contiguous()
    dstates, past = call.dstates(dy, decays, states, dinitial, dfinal_state)
    dx = call.dx(dy, decays, cb, dstates, sums)
    dB, dC = call.products(dy, decays, cb, states, dstates, sums)
    ddt, dA, dbias = call.ddt(decays, sums, past)
    return (
        dx,
        ddt,
        dA.sum((0, 2)).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        x.new_empty(0) if D is None else sums[:, :, 2].sum((0, 2)).to(D.dtype),
        x.new_empty(0) if dt_bias is None else dbias.sum((0, 2)).to(dt_bias.dtype),
        x.new_empty(0) if initial_state is None else dinitial,
    )


def _call(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    documents: Tensor | None,
    limits: tuple[bool, float, float],
    chunk_size: int,
    largest: int,
) -> Call:
    return Call(
        kernels=Kernels(
            decays=_decays_kernel,
            states=_states_kernel,
            cb=_cb_kernel,
            scan=_scan_kernel,
            dstates=_dstates_kernel,
            dx=_dx_kernel,
            dc=_dc_kernel,
            db=_db_kernel,
            ddt=_ddt_kernel,
        ),
        compute={"COMPUTE": accumulator(x.dtype), "PRECISION": float32_precision()},
        x=rows(x),
        dt=dt,
        A=A.contiguous(),
        B=rows(B.to(x.dtype)),
        C=rows(C.to(x.dtype)),
        D=_dense(D),
        bias=_dense(dt_bias),
        documents=_dense(documents),
        limits=limits,
        chunk=chunk_of(x.dtype, chunk_size, largest),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit
def is_large(dt):
    """Where softplus is the identity, as in torch: above 20."""
    return tl.maximum(dt, 20) != 20


@triton.jit
def softened(dt, SOFTPLUS: tl.constexpr):
    """Softplus, right where it is tiny too."""
    if SOFTPLUS:
        grown = tl.exp(tl.where(is_large(dt), 0, dt))
        above = 1 + grown
        # What adding to 1 loses of a small number is lost of the quotient alike.
        rest = tl.where(above == 1, 1, above - 1)
        log = tl.where(above == 1, grown, tl.log(above) * (grown / rest))
        dt = tl.where(is_large(dt), dt, log)
    return dt


@triton.jit
def clamped(dt, dt_min, dt_max):
    """Within the limits; NaN stays NaN."""
    least = tl.maximum(dt, dt_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(least, dt_max, propagate_nan=tl.PropagateNan.ALL).to(dt.dtype)


@triton.jit
def _raw_steps(
    dt_at, bias_ptr, heads, inside, head_in, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What softplus takes, (heads, tokens)."""
    dt = tl.load(dt_at, mask=inside, other=0).to(COMPUTE)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + heads, mask=head_in, other=0).to(COMPUTE)[:, None]
    return dt


@triton.jit
def _decays_kernel(
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
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * CHUNK
    tokens = start + tl.arange(0, CHUNK)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_in = heads < num_heads
    inside = head_in[:, None] & (tokens < num_tokens)[None, :]
    at = dt_ptr + sequence * dt_sequence + tokens.to(tl.int64)[None, :] * dt_token
    at += heads[:, None] * dt_head
    dt = softened(_raw_steps(at, bias_ptr, heads, inside, head_in, HAS_BIAS, COMPUTE), SOFTPLUS)
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
def _left(
    decays,
    width,
    documents_ptr,
    index,
    num_tokens,
    HAS_DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """What is left at token i of what token j put in, (i, j), or (j, i) if TRANSPOSED.

    0 where i is before j or in another document. ``index`` counts the chunks of all sequences, and
    ``decays`` points to those of its tokens.
    """
    tokens = tl.arange(0, CHUNK)
    logs, lost = tl.load(decays + width), tl.load(decays + 2 * width)
    if TRANSPOSED:
        sees = tokens[None, :] >= tokens[:, None]
        log = (logs[None, :] - logs[:, None]) + (lost[None, :] - lost[:, None])
    else:
        sees = tokens[:, None] >= tokens[None, :]
        log = (logs[:, None] - logs[None, :]) + (lost[:, None] - lost[None, :])
    if HAS_DOCUMENTS:
        chunks = tl.cdiv(num_tokens, CHUNK)
        places = tl.minimum(index % chunks * CHUNK + tokens, num_tokens - 1)
        document = tl.load(documents_ptr + index // chunks * num_tokens + places)
        sees = sees & (document[:, None] == document[None, :])
    return tl.where(sees, tl.exp(log), 0)


@triton.jit
def _store_for_next(at, values, CHUNK: tl.constexpr):
    """Store a token's value with the next token of its chunk, and 0 with the first."""
    q = tl.arange(0, CHUNK)
    next_q = (q + 1) % CHUNK
    tl.store(at - q + next_q, tl.where(next_q == 0, 0, values))


@triton.jit
def _states_kernel(
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
def _cb_kernel(
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
def _scan_kernel(
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
    left = _left(decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, False)
    weights = left * tl.load(cb_at + q[:, None] * CHUNK + q[None, :]) * tl.load(decays)[None, :]
    y = dot(weights.to(x.dtype), x, y, PRECISION)
    if HAS_D:
        y += x.to(COMPUTE) * tl.load(d_ptr + head).to(COMPUTE)
    at = y_ptr + ((sequence * num_tokens + tokens) * num_heads + head)[:, None] * head_dim
    tl.store(at + p[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dstates_kernel(
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
def _dx_kernel(
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
    _store_for_next(sums + width, tl.sum(x * du, axis=1) * steps, CHUNK)

    dy_at = dy_ptr + sequence * dy_sequence + head * head_dim
    dy = tl.load(dy_at + tokens[:, None] * dy_token + p[None, :], mask=inside, other=0)
    cb_at = cb_ptr + (index * (num_heads // heads_in_group) + group) * (CHUNK * CHUNK)
    left = _left(decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, True)
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
def _dc_kernel(
    dy_ptr,
    x_ptr,
    b_ptr,
    c_ptr,
    cb_ptr,
    states_ptr,
    decays_ptr,
    documents_ptr,
    dc_ptr,
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
    b_sequence,
    b_token,
    c_sequence,
    c_token,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    index, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    chunks = tl.cdiv(num_tokens, CHUNK)
    sequence, chunk, width = index // chunks, index % chunks, chunks * CHUNK
    q, p = tl.arange(0, CHUNK), tl.arange(0, HEAD)
    n = part * STATE + tl.arange(0, STATE)
    tokens = chunk * CHUNK + q
    token_in, p_in, n_in = tokens < num_tokens, p < head_dim, n < state_size
    inside = token_in[:, None] & n_in[None, :]
    c_at = c_ptr + sequence * c_sequence + group * state_size + tokens[:, None] * c_token
    pairs = (index * tl.num_programs(1) + group) * (CHUNK * CHUNK)
    pairs += q[:, None] * CHUNK + q[None, :]
    dc = tl.zeros((CHUNK, STATE), COMPUTE)
    dcb = tl.zeros((CHUNK, CHUNK), COMPUTE)
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
        taken = tl.sum(c * earlier, axis=1)
        x_at = x_ptr + sequence * x_sequence + head * head_dim + tokens[None, :] * x_token
        x = tl.load(x_at + p[:, None], mask=p_in[:, None] & token_in[None, :], other=0)
        left = _left(decays, width, documents_ptr, index, num_tokens, HAS_DOCUMENTS, CHUNK, False)
        met = dot(dy, x, tl.zeros((CHUNK, CHUNK), COMPUTE), PRECISION)
        met *= left * tl.load(decays)[None, :]
        dcb += met
        if part == 0:
            # What passes between a token and the next: from tokens up to it to those after it.
            earlier_pair = q[:, None] > q[None, :]
            met = tl.where(earlier_pair, met * tl.load(cb_ptr + pairs), 0)
            passing = tl.where(earlier_pair, tl.cumsum(met, axis=1), 0)
            _store_for_next(sums + 3 * width, tl.sum(passing, axis=0), CHUNK)
        tl.store(sums + (4 + part) * width, taken)
    b_at = b_ptr + sequence * b_sequence + group * state_size + tokens[:, None] * b_token
    b = tl.load(b_at + n[None, :], mask=inside, other=0)
    rounded = dcb.to(dcb_ptr.dtype.element_ty)
    dc = dot(rounded, b, dc, PRECISION)
    at = (sequence * num_tokens + tokens) * tl.num_programs(1) + group
    at = dc_ptr + at[:, None] * state_size + n[None, :]
    tl.store(at, dc.to(dc_ptr.dtype.element_ty), mask=inside)
    if part == 0:
        tl.store(dcb_ptr + pairs, rounded)


@triton.jit
def _db_kernel(
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
def _ddt_kernel(
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
    dt = _raw_steps(at, bias_ptr, heads, inside, head_in, HAS_BIAS, COMPUTE)
    soft = softened(dt, SOFTPLUS)
    ddt = tl.where((soft >= dt_min) & (soft <= dt_max) & inside, dsteps, 0)
    if SOFTPLUS:
        ddt = tl.where(is_large(dt), ddt, ddt * sigmoid(dt))
    tl.store(dbias_ptr + index * chunks + chunk, tl.sum(ddt, axis=1), mask=head_in)
    out = ddt_ptr + (sequence * num_tokens + tokens)[None, :] * num_heads + heads[:, None]
    tl.store(out, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
