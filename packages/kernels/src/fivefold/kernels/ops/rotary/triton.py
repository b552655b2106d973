"""``rotary`` in Triton: a program takes some tokens and walks over some of their heads.

The angles are loaded once for all those heads.

Legend: B sequences, T tokens, H heads, D values in a head, P pairs of them that are rotated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.kernels.launch import launch
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator

# Of one head: 8 pairs a thread, so two loads of 16 bytes in bfloat16. Larger tiles leave too few
# programs for a GPU at the usual sizes.
_TILE, _HEADS, _NUM_WARPS = 1024, 4, 4


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_first: bool, inverse: bool
) -> Tensor:
    """``x``, rotated, and back if ``inverse``; contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_bthd = y.transpose(1, 2) if heads_first else y
    x_bthd = _dense(x.transpose(1, 2) if heads_first else x)
    cos, sin = _dense(cos), _dense(sin)
    batch, num_tokens, num_heads, head_dim = x_bthd.shape
    tile = _tile(num_tokens, num_heads, head_dim, cos.shape[2])
    token_blocks = triton.cdiv(num_tokens, tile["TOKENS"])
    head_blocks = triton.cdiv(num_heads, tile["HEADS"])
    launch(
        _kernel,
        (head_blocks * token_blocks * batch,),
        x_bthd,
        cos,
        sin,
        y_bthd,
        num_tokens,
        num_heads,
        token_blocks,
        head_blocks,
        *x_bthd.stride()[:3],
        *_angle_strides(cos),
        *_angle_strides(sin),
        *y_bthd.stride()[:3],
        NUM_PAIRS=cos.shape[2],
        HEAD_DIM=head_dim,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        COMPUTE=accumulator(x.dtype),
        num_warps=_num_warps(tile),
        **tile,
    )
    return y


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    num_tokens,
    num_heads,
    token_blocks,
    head_blocks,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    y_batch_stride,
    y_token_stride,
    y_head_stride,
    NUM_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSED: tl.constexpr,
):
    # Heads first, so that programs that run together share angles.
    first_head = (tl.program_id(0) % head_blocks) * HEADS
    block = tl.program_id(0) // head_blocks
    batch = (block // token_blocks).to(tl.int64)
    tokens = (block % token_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pairs = tl.arange(0, PAIRS)
    token_in, pair_in = tokens < num_tokens, pairs < NUM_PAIRS

    angle_in = token_in[:, None] & pair_in[None, :]
    cos_at = batch * cos_batch_stride + tokens[:, None] * cos_token_stride + pairs[None, :]
    sin_at = batch * sin_batch_stride + tokens[:, None] * sin_token_stride + pairs[None, :]
    cos = tl.load(cos_ptr + cos_at, mask=angle_in, other=0).to(COMPUTE)
    sin = tl.load(sin_ptr + sin_at, mask=angle_in, other=0).to(COMPUTE)
    if INVERSE:
        sin = -sin

    x_rows = x_ptr + batch * x_batch_stride + tokens[:, None] * x_token_stride
    y_rows = y_ptr + batch * y_batch_stride + tokens[:, None] * y_token_stride
    for step in tl.static_range(HEADS):
        # A head for each row, though all are the same: the interpreter joins no mask of one value
        # with a mask of many.
        heads = tl.zeros_like(tokens)[:, None] + first_head + step
        row_in = token_in[:, None] & (heads < num_heads)
        x_at, y_at = x_rows + heads * x_head_stride, y_rows + heads * y_head_stride
        if INTERLEAVED:
            values = tl.arange(0, 2 * PAIRS)[None, :]
            inside = row_in & (values < 2 * NUM_PAIRS)
            x = tl.load(x_at + values, mask=inside, other=0).to(COMPUTE)
            a, b = tl.split(tl.reshape(x, (TOKENS, PAIRS, 2)))
            y = tl.interleave(a * cos - b * sin, b * cos + a * sin)
            tl.store(y_at + values, y.to(y_ptr.dtype.element_ty), mask=inside)
        else:
            inside = row_in & pair_in[None, :]
            a = tl.load(x_at + pairs[None, :], mask=inside, other=0).to(COMPUTE)
            b = tl.load(x_at + NUM_PAIRS + pairs[None, :], mask=inside, other=0).to(COMPUTE)
            first = (a * cos - b * sin).to(y_ptr.dtype.element_ty)
            second = (b * cos + a * sin).to(y_ptr.dtype.element_ty)
            tl.store(y_at + pairs[None, :], first, mask=inside)
            tl.store(y_at + NUM_PAIRS + pairs[None, :], second, mask=inside)
        if PASSED > 0:
            values = 2 * NUM_PAIRS + tl.arange(0, PASSED)[None, :]
            inside = row_in & (values < HEAD_DIM)
            tl.store(y_at + values, tl.load(x_at + values, mask=inside, other=0), mask=inside)


def _dense(x: Tensor) -> Tensor:
    """With values of the last dim side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _angle_strides(table: Tensor) -> tuple[int, int]:
    """From sequence to sequence, 0 if all have the same, and from token to token."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)


def _tile(num_tokens: int, num_heads: int, head_dim: int, num_pairs: int) -> dict[str, int]:
    pairs = next_power_of_2(num_pairs)
    passed = head_dim - 2 * num_pairs
    return {
        "TOKENS": min(max(1, _TILE // pairs), next_power_of_2(num_tokens), 128),
        "HEADS": min(next_power_of_2(num_heads), _HEADS),
        "PAIRS": pairs,
        "PASSED": next_power_of_2(passed) if passed else 0,
    }


def _num_warps(tile: dict[str, int]) -> int:
    """Fewer for the few tokens of a step of generation."""
    return max(1, min(_NUM_WARPS, tile["TOKENS"] * tile["PAIRS"] // (_TILE // _NUM_WARPS)))
