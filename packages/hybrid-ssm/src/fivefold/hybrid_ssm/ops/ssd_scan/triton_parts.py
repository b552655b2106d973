"""What the kernels of ``ssd_scan`` share: step sizes, and what is left between tokens.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

import triton
import triton.language as tl


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
def raw_steps(
    dt_at, bias_ptr, heads, inside, head_in, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What softplus takes, (heads, tokens)."""
    dt = tl.load(dt_at, mask=inside, other=0).to(COMPUTE)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + heads, mask=head_in, other=0).to(COMPUTE)[:, None]
    return dt


@triton.jit
def left_over(
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
def store_for_next(at, values, CHUNK: tl.constexpr):
    """Store a token's value with the next token of its chunk, and 0 with the first."""
    q = tl.arange(0, CHUNK)
    next_q = (q + 1) % CHUNK
    tl.store(at - q + next_q, tl.where(next_q == 0, 0, values))
