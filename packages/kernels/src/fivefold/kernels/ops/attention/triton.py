"""``attention`` in Triton: scores live a tile at a time in registers (FlashAttention-2).

A program owns a tile of queries (results, their gradient) or of keys (gradients of key and value)
and walks the tiles of the other side that the band lets it see: first those that the band's start
cuts, then those that nothing cuts, then those that its end or the length cuts. Exponents are to
base 2. The bias's gradient has a kernel of its own, in which a program owns a tile of the bias and
walks all that share it: no atomics, so results repeat bit for bit. Letters as in ``operands``.
"""

import torch
import triton
from torch import Tensor

from fivefold.kernels.backends import interpreting
from fivefold.kernels.launch import launch, num_sms, tensor_cores
from fivefold.kernels.ops.attention import tiles
from fivefold.kernels.ops.attention.operands import Call, by_position
from fivefold.kernels.ops.attention.shapes import rows_of
from fivefold.kernels.ops.attention.triton_backward import (
    dbias_kernel,
    dkey_kernel,
    dquery_kernel,
)
from fivefold.kernels.ops.attention.triton_forward import forward_kernel


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
    cores, out = tensor_cores(query), by_position(query, value.shape[-1])
    lse = torch.empty(query.shape[:-1], dtype=call.wide, device=query.device)
    tile = tiles.forward(query.shape[3], call.widest, query.dtype, cores)
    launch(
        forward_kernel,
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
    cores = tensor_cores(query)
    numbers = (*call.strides, *dout.stride()[:3], *call.bias_strides, *call.numbers)

    tile = tiles.dquery(query.shape[3], call.widest, query.dtype, cores)
    launch(
        dquery_kernel,
        (triton.cdiv(query.shape[3], tile.queries) * lse.shape[:3].numel(),),
        *(*call.operands, out, lse, dout, dlse, dquery, delta, *numbers),
        **call.constants,
        **tile.constants(),
    )
    tile = tiles.dkey(key.shape[3], call.widest, query.dtype, cores)
    launch(
        dkey_kernel,
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
        dbias_kernel,
        (splits * walk.owners,),
        *(*call.operands, lse, dout, delta, partial, *numbers),
        *(bias.shape[1], walk.owners, walk.steps, splits),
        **walk.constants(),
        **call.constants,
        **tile.constants(),
    )
    return dquery, dkey, dvalue, partial.sum(0).to(bias.dtype)
