"""``attention`` as registered ops: shapes for tracing, gradients.

Every backend sees query (B, R, H, Tq, D), key (B, R, G, Tk, D) and value (B, R, G, Tk, Dv), a bias
(B, H or 1, Tq or 1, Tk or 1) that all R share, and a mask of keys (B, R, Tk). Query i sees keys
i + band_start to i + band_end. Results lie in memory as (B, R, T, heads, width).
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.autocast import as_autocast
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.attention.shapes import Leading, Options, check

__all__ = ["Options", "apply", "attention_backward", "attention_forward"]

BACKENDS = ("cpu", "aten", "triton", "reference")


@define("fivefold_kernels", backends=BACKENDS)
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The result (B, R, H, Tq, Dv) and the log-sum-exp of the scores (B, R, H, Tq)."""
    lse_dtype = sum_dtype(query.dtype)
    return (
        _by_position(query, value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=lse_dtype),
    )


@define("fivefold_kernels", backends=BACKENDS)
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, that of bias empty (0,) where not wanted."""
    return (
        _by_position(query, query.shape[-1]),
        _by_position(key, key.shape[-1]),
        _by_position(value, value.shape[-1]),
        query.new_empty(0) if bias is None or not wants_dbias else bias.new_empty(bias.shape),
    )


def _by_position(x: Tensor, width: int) -> Tensor:
    batch, rows, heads, length, _ = x.shape
    return x.new_empty(batch, rows, length, heads, width).transpose(2, 3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, key_mask, *ctx.options, ctx.backend = inputs
    # None instead of zeros for a log-sum-exp that nobody used: fused kernels know no other.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, key_mask, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, bias, key_mask, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    wants_dbias = bias is not None and ctx.needs_input_grad[3]
    saved = (query, key, value, bias, key_mask, out, lse)
    dquery, dkey, dvalue, dbias = attention_backward(
        dout, dlse, *saved, *ctx.options, wants_dbias, ctx.backend
    )
    return dquery, dkey, dvalue, dbias if wants_dbias else None, None, None, None, None, None


attention_forward.differentiate(_save, _backward)


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See ``attention``: follow autocast, check, fold the leading dims, run, unfold them."""
    query, key, value = as_autocast(query, key, value)
    check(query, key, value, bias, key_mask, options)
    leading = Leading(query.shape[:-3], bias)
    out, lse = attention_forward(
        leading.fold(query),
        leading.fold(key),
        leading.fold(value),
        None if bias is None else leading.fold_bias(bias),
        None if key_mask is None else leading.fold_mask(key_mask, key.shape[-2]),
        *options.band(),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        backend,
    )
    return leading.unfold(out), leading.unfold(lse)
