"""``attention`` in C++, see cpu.cpp: with the gradient of a bias, and no scores kept.

Legend: B batches, R rows that share a bias, H query heads, G key heads, Tq queries, Tk keys.
"""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.attention.shapes import rows_of

SOURCE = Path(__file__).with_suffix(".cpp")
_NO_BOUND = 1 << 40


def refuses(name: str, *inputs: object) -> str | None:
    """Dtypes that it has no code for, and machines where the file cannot be compiled."""
    query = inputs[2] if name == "attention_backward" else inputs[0]
    if isinstance(query, Tensor) and query.dtype not in native.TYPES:
        return f"its kernel takes float16 to float64, these are {query.dtype}"
    return native.refusal(SOURCE)


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
    wide = sum_dtype(query.dtype)
    out = _by_position(query, value.shape[-1])
    lse = torch.empty(tuple(query.shape[:-1]), dtype=wide)
    q, k, v, o = (rows_of(x) for x in (query, key, value, out))
    added, steps = _bias(bias, query, key)
    strides = (*(step for x in (q, k, v, o) for step in x.stride()[:3]), *steps)
    native.call(
        native.load(SOURCE).attention_forward,
        native.TYPES[query.dtype],
        q,
        k,
        v,
        added,
        _bytes(key_mask),
        out,
        lse,
        _numbers(_sizes(query, key, value, band_start, band_end)),
        _numbers(strides),
        float(scale),
        torch.get_num_threads(),
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
    wide, num_threads = sum_dtype(query.dtype), torch.get_num_threads()
    batch, rows, heads, num_queries, _ = query.shape
    dquery, dkey, dvalue = (_by_position(x, x.shape[-1]) for x in (query, key, value))
    # Rows that run side by side need sums of their own, so no more of them than threads.
    groups = max(batch * key.shape[2], 1)
    chunks = max(1, min(rows, -(-num_threads // groups) if wants_dbias else rows))
    sums = None
    if wants_dbias:
        sums = torch.zeros((chunks, batch, heads, num_queries, key.shape[-2]), dtype=wide)
    q, k, v, o, do, *gradients = (
        rows_of(x) for x in (query, key, value, out, dout, dquery, dkey, dvalue)
    )
    added, steps = _bias(bias, query, key)
    first = (step for x in (q, k, v, o) for step in x.stride()[:3])
    last = (step for x in (do, *gradients) for step in x.stride()[:3])
    native.call(
        native.load(SOURCE).attention_backward,
        native.TYPES[query.dtype],
        do,
        None if dlse is None else dlse.to(wide).contiguous(),
        q,
        k,
        v,
        added,
        _bytes(key_mask),
        o,
        lse.contiguous(),
        *gradients,
        sums,
        _numbers(_sizes(query, key, value, band_start, band_end)),
        _numbers((*first, *steps, *last)),
        chunks,
        float(scale),
        num_threads,
    )
    if sums is None or bias is None:
        return dquery, dkey, dvalue, query.new_empty(0)
    dbias = sums[0] if chunks == 1 else sums.sum(0)
    return dquery, dkey, dvalue, dbias.sum_to_size(bias.shape).to(bias.dtype)


def _by_position(x: Tensor, width: int) -> Tensor:
    batch, rows, heads, length, _ = x.shape
    return torch.empty((batch, rows, length, heads, width), dtype=x.dtype).transpose(2, 3)


def _bias(bias: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """A bias whose keys lie together, and its strides over (B, H, Tq, Tk)."""
    if bias is None:
        return None, (0, 0, 0, 0)
    bias = bias.to(sum_dtype(query.dtype)).contiguous()
    batch, _, heads, num_queries, _ = query.shape
    expanded = bias.expand(batch, heads, num_queries, key.shape[-2])
    # Where there is one key its stride may be anything.
    return bias, (*expanded.stride()[:3], min(expanded.stride(3), 1))


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, band_start: int | None, band_end: int | None
) -> tuple[int, ...]:
    batch, rows, heads, num_queries, width = query.shape
    band = (
        -_NO_BOUND if band_start is None else band_start,
        _NO_BOUND if band_end is None else band_end,
    )
    return batch, rows, heads, key.shape[2], num_queries, key.shape[3], width, value.shape[4], *band


def _numbers(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
