"""``causal_conv1d`` in Triton: tiles of tokens by channels.

The gradient of an input is made of the gradients at the tokens that see it; each tile computes
those again, whose inputs are in the cache, rather than pass them through memory.

Legend: B batch, S tokens, K channels, W taps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, sigmoid

# All taps are unrolled, in the gradient twice over.
_MOST_TAPS = 8


def refuses(name: str, *inputs: Any) -> str | None:
    """Convolutions too wide to unroll."""
    weight = inputs[3] if name == "causal_conv1d_backward" else inputs[1]
    if weight.shape[1] > _MOST_TAPS:
        return f"its kernels take up to {_MOST_TAPS} taps, these are {weight.shape[1]}"
    return None


def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result (B, S, K) and the final state (B, W - 1, K)."""
    x = _rows(x)
    batch, num_tokens, num_channels = x.shape
    num_taps = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = torch.empty((batch, num_taps - 1, num_channels), dtype=x.dtype, device=x.device)
    constants = _constants(x, weight, bias, initial_state, documents, silu)
    # One tile at least: a sequence of no tokens has a final state too.
    tiles = max(1, triton.cdiv(num_tokens, constants["TOKENS"]))
    launch(
        _forward_kernel,
        (batch * tiles, triton.cdiv(num_channels, constants["CHANNELS"])),
        x,
        weight.mT.contiguous(),
        _dense(bias),
        _dense(initial_state),
        _dense(documents),
        y,
        final_state,
        num_tokens,
        num_channels,
        tiles,
        *x.stride()[:2],
        **constants,
    )
    return y, final_state


def causal_conv1d_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    dy, x = _rows(dy), _rows(x)
    batch, num_tokens, num_channels = x.shape
    num_taps = weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = x.new_empty(0)
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=x.dtype, device=x.device)
    constants = _constants(x, weight, bias, initial_state, documents, silu)
    tiles = triton.cdiv(num_tokens + num_taps - 1, constants["TOKENS"])
    # Each tile's sums of what the taps and, last, the bias get.
    partial = torch.empty(
        (batch * tiles, num_taps + 1, num_channels),
        dtype=torch.promote_types(x.dtype, torch.float32),
        device=x.device,
    )
    launch(
        _backward_kernel,
        (batch * tiles, triton.cdiv(num_channels, constants["CHANNELS"])),
        dy,
        _dense(dfinal_state),
        x,
        weight.mT.contiguous(),
        _dense(bias),
        _dense(initial_state),
        _dense(documents),
        dx,
        dinitial,
        partial,
        num_tokens,
        num_channels,
        tiles,
        *dy.stride()[:2],
        *x.stride()[:2],
        HAS_FINAL=dfinal_state is not None,
        num_warps=8,
        **constants,
    )
    sums = partial.sum(0)
    return (
        dx,
        sums[:-1].mT.to(weight.dtype).contiguous(),
        x.new_empty(0) if bias is None else sums[-1].to(bias.dtype, copy=True),
        dinitial,
    )


def _constants(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> dict[str, Any]:
    channels = min(128, max(16, next_power_of_2(x.shape[2])))
    return {
        "HAS_BIAS": bias is not None,
        "HAS_INITIAL": initial_state is not None,
        "HAS_DOCUMENTS": documents is not None,
        "SILU": silu,
        "COMPUTE": accumulator(x.dtype),
        "TAPS": weight.shape[1],
        "TOKENS": min(32, max(8, next_power_of_2(x.shape[1]))),
        "CHANNELS": channels,
    }


def _rows(x: Tensor) -> Tensor:
    """(B, S, K) whose channels lie side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit
def _document(row, tokens, num_tokens, HAS_DOCUMENTS: tl.constexpr):
    """Of each token; what is before the first belongs to the first's, and so past the last."""
    if HAS_DOCUMENTS:
        places = tl.minimum(tl.maximum(tokens, 0), num_tokens - 1)
        return tl.load(row + places)
    else:
        return tl.zeros_like(tokens)


@triton.jit
def _inputs(
    x_at,
    initial_at,
    tokens,
    wanted,
    channel_in,
    num_tokens,
    num_channels,
    x_token,
    HAS_INITIAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The inputs of tokens where ``wanted``, from before the first too, else 0."""
    here = wanted & (tokens >= 0) & (tokens < num_tokens)
    mask = here[:, None] & channel_in[None, :]
    x = tl.load(x_at + tokens[:, None] * x_token, mask=mask, other=0).to(COMPUTE)
    if HAS_INITIAL:
        before = wanted & (tokens < 0) & (tokens >= -KEPT)
        mask = before[:, None] & channel_in[None, :]
        at = initial_at + (tokens + KEPT)[:, None] * num_channels
        x += tl.load(at, mask=mask, other=0).to(COMPUTE)
    return x


@triton.jit
def _convolved(
    x_at,
    initial_at,
    weight_at,
    bias_at,
    row,
    tokens,
    channel_in,
    num_tokens,
    num_channels,
    x_token,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What the activation takes, (tokens, channels); ``weight_at`` points into (W, K)."""
    y = tl.zeros((TOKENS, CHANNELS), COMPUTE)
    own = _document(row, tokens, num_tokens, HAS_DOCUMENTS)
    for tap in tl.static_range(TAPS):
        met = tokens - (TAPS - 1 - tap)
        sees = _document(row, met, num_tokens, HAS_DOCUMENTS) == own
        x = _inputs(
            x_at,
            initial_at,
            met,
            sees,
            channel_in,
            num_tokens,
            num_channels,
            x_token,
            HAS_INITIAL,
            COMPUTE,
            TAPS - 1,
        )
        weight = tl.load(weight_at + tap * num_channels, mask=channel_in, other=0)
        y += x * weight.to(COMPUTE)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_at, mask=channel_in, other=0).to(COMPUTE)[None, :]
    return y


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    documents_ptr,
    y_ptr,
    final_ptr,
    num_tokens,
    num_channels,
    tiles,
    x_sequence,
    x_token,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sequence, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tokens = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channels < num_channels
    x_at = x_ptr + sequence * x_sequence + channels[None, :]
    initial_at, row, bias_at = x_at, x_ptr, x_at
    if HAS_INITIAL:
        initial_at = initial_ptr + sequence * ((TAPS - 1) * num_channels) + channels[None, :]
    if HAS_DOCUMENTS:
        row = documents_ptr + sequence * num_tokens
    if HAS_BIAS:
        bias_at = bias_ptr + channels
    y = _convolved(
        x_at,
        initial_at,
        weight_ptr + channels,
        bias_at,
        row,
        tokens,
        channel_in,
        num_tokens,
        num_channels,
        x_token,
        HAS_BIAS,
        HAS_INITIAL,
        HAS_DOCUMENTS,
        COMPUTE,
        TAPS,
        TOKENS,
        CHANNELS,
    )
    if SILU:
        y *= sigmoid(y)
    inside = (tokens < num_tokens)[:, None] & channel_in[None, :]
    at = y_ptr + (sequence * num_tokens + tokens)[:, None] * num_channels + channels[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if tile == 0:
        for kept in tl.static_range(TAPS - 1):
            token = tl.full((1,), num_tokens - (TAPS - 1 - kept), tl.int64)
            last = _document(row, token * 0 + num_tokens, num_tokens, HAS_DOCUMENTS)
            seen = _document(row, token, num_tokens, HAS_DOCUMENTS) == last
            x = _inputs(
                x_at,
                initial_at,
                token,
                seen,
                channel_in,
                num_tokens,
                num_channels,
                x_token,
                HAS_INITIAL,
                COMPUTE,
                TAPS - 1,
            )
            final_at = final_ptr + (sequence * (TAPS - 1) + kept) * num_channels
            final_at += channels[None, :]
            tl.store(final_at, x.to(final_ptr.dtype.element_ty), mask=channel_in[None, :])


@triton.jit
def _backward_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    documents_ptr,
    dx_ptr,
    dinitial_ptr,
    partial_ptr,
    num_tokens,
    num_channels,
    tiles,
    dy_sequence,
    dy_token,
    x_sequence,
    x_token,
    HAS_FINAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sequence, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    # Inputs from before the first token have gradients too.
    tokens = (tile * TOKENS + tl.arange(0, TOKENS) - (TAPS - 1)).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channels < num_channels
    x_at = x_ptr + sequence * x_sequence + channels[None, :]
    initial_at, row, bias_at = x_at, x_ptr, x_at
    if HAS_INITIAL:
        initial_at = initial_ptr + sequence * ((TAPS - 1) * num_channels) + channels[None, :]
    if HAS_DOCUMENTS:
        row = documents_ptr + sequence * num_tokens
    if HAS_BIAS:
        bias_at = bias_ptr + channels
    weight_at = weight_ptr + channels
    dy_at = dy_ptr + sequence * dy_sequence + channels[None, :]
    own = _document(row, tokens, num_tokens, HAS_DOCUMENTS)
    x = _inputs(
        x_at,
        initial_at,
        tokens,
        tokens == tokens,
        channel_in,
        num_tokens,
        num_channels,
        x_token,
        HAS_INITIAL,
        COMPUTE,
        TAPS - 1,
    )
    dx = tl.zeros((TOKENS, CHANNELS), COMPUTE)
    sums_at = partial_ptr + tl.program_id(0).to(tl.int64) * ((TAPS + 1) * num_channels) + channels
    for tap in tl.static_range(TAPS):
        users = tokens + (TAPS - 1 - tap)
        user_in = (users >= 0) & (users < num_tokens)
        mask = user_in[:, None] & channel_in[None, :]
        d = tl.load(dy_at + users[:, None] * dy_token, mask=mask, other=0).to(COMPUTE)
        if SILU:
            y = _convolved(
                x_at,
                initial_at,
                weight_at,
                bias_at,
                row,
                users,
                channel_in,
                num_tokens,
                num_channels,
                x_token,
                HAS_BIAS,
                HAS_INITIAL,
                HAS_DOCUMENTS,
                COMPUTE,
                TAPS,
                TOKENS,
                CHANNELS,
            )
            logistic = sigmoid(y)
            d *= logistic * (1 + y * (1 - logistic))
        if tap == TAPS - 1:
            tl.store(sums_at + TAPS * num_channels, tl.sum(d, axis=0), mask=channel_in)
        sees = _document(row, users, num_tokens, HAS_DOCUMENTS) == own
        d = tl.where(sees[:, None], d, 0)
        weight = tl.load(weight_at + tap * num_channels, mask=channel_in, other=0)
        dx += d * weight.to(COMPUTE)[None, :]
        tl.store(sums_at + tap * num_channels, tl.sum(d * x, axis=0), mask=channel_in)
    if HAS_FINAL:
        rows = tokens - (num_tokens - (TAPS - 1))
        last = _document(row, tokens * 0 + num_tokens, num_tokens, HAS_DOCUMENTS)
        kept = (rows >= 0) & (rows < TAPS - 1) & (own == last)
        at = dfinal_ptr + (sequence * (TAPS - 1) + rows)[:, None] * num_channels
        mask = kept[:, None] & channel_in[None, :]
        dx += tl.load(at + channels[None, :], mask=mask, other=0).to(COMPUTE)
    inside = ((tokens >= 0) & (tokens < num_tokens))[:, None] & channel_in[None, :]
    at = dx_ptr + (sequence * num_tokens + tokens)[:, None] * num_channels + channels[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_INITIAL:
        before = (tokens < 0)[:, None] & channel_in[None, :]
        at = dinitial_ptr + (sequence * (TAPS - 1) + (tokens + (TAPS - 1)))[:, None] * num_channels
        tl.store(at + channels[None, :], dx.to(dinitial_ptr.dtype.element_ty), mask=before)
