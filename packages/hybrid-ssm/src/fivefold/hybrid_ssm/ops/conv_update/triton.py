"""``conv_update`` in Triton: the channels of a sequence side by side.

Legend: B batch, K channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import launch
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, sigmoid


def conv_update_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, K)."""
    batch, num_channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Small tiles in the interpreter, so that small tensors have several.
    channels = min(32 if interpreting() else 1024, next_power_of_2(num_channels))
    launch(
        _step_kernel,
        (batch, triton.cdiv(num_channels, channels)),
        state,
        x if x.stride(1) == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        num_channels,
        *state.stride(),
        x.stride(0) if x.stride(1) == 1 else num_channels,
        HAS_BIAS=bias is not None,
        SILU=silu,
        COMPUTE=accumulator(x.dtype),
        TAPS=weight.shape[1],
        CHANNELS=channels,
    )
    return y


@triton.jit
def _move(y, state_at, weight_at, inside, row, COMPUTE: tl.constexpr, TAPS: tl.constexpr):
    """``y`` plus what the state's rows add; each goes where the one before it was."""
    for tap in tl.static_range(TAPS - 1):
        kept = tl.load(state_at + tap * row, mask=inside, other=0)
        y += kept.to(COMPUTE) * tl.load(weight_at + tap, mask=inside, other=0).to(COMPUTE)
        if tap > 0:
            tl.store(state_at + (tap - 1) * row, kept, mask=inside)
    return y


@triton.jit
def _step_kernel(
    state_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_channels,
    state_sequence,
    state_row,
    state_channel,
    x_sequence,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < num_channels
    state_at = state_ptr + sequence * state_sequence + channels * state_channel
    weight_at = weight_ptr + channels * TAPS
    newest = tl.load(x_ptr + sequence * x_sequence + channels, mask=inside, other=0)
    y = newest.to(COMPUTE) * tl.load(weight_at + (TAPS - 1), mask=inside, other=0).to(COMPUTE)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channels, mask=inside, other=0).to(COMPUTE)
    y = _move(y, state_at, weight_at, inside, state_row, COMPUTE, TAPS)
    if TAPS > 1:
        tl.store(state_at + (TAPS - 2) * state_row, newest, mask=inside)
    if SILU:
        y *= sigmoid(y)
    tl.store(y_ptr + sequence * num_channels + channels, y.to(y_ptr.dtype.element_ty), mask=inside)
