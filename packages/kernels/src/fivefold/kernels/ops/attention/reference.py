"""The specification of ``attention`` in plain PyTorch, and its gradient written out.

Scores are made for some queries at a time, so that long inputs fit in memory.

Legend: b batch, r rows that share a bias, h query heads, g key heads, q queries, k keys, d width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fivefold.kernels.operands import widened

# So many scores are made at once: 64 MiB in float32.
_SCORES_AT_ONCE = 1 << 24


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
    key_brgkd, value_brgkd = widened(key), widened(value)
    outs, lses = [], []
    for some in _some_queries(query, key):
        scores_brhqk = _scores(query[..., some, :], key_brgkd, scale)
        scores_brhqk = _biased(scores_brhqk, some, bias, key_mask, band_start, band_end)
        unseen_brhq1 = (scores_brhqk == -torch.inf).all(-1, keepdim=True)
        scores_brhqk = scores_brhqk.masked_fill(unseen_brhq1, 0)
        lse_brhq1 = torch.logsumexp(scores_brhqk, -1, keepdim=True)
        p_brhqk = (scores_brhqk - lse_brhq1).exp().masked_fill(unseen_brhq1, 0)
        outs.append(_product(p_brhqk, value_brgkd))
        lses.append(lse_brhq1.masked_fill(unseen_brhq1, -torch.inf).squeeze(-1))
    return by_position(torch.cat(outs, -2).to(query.dtype)), torch.cat(lses, -1)


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
    key_brgkd, value_brgkd = widened(key), widened(value)
    dkey, dvalue = torch.zeros_like(key_brgkd), torch.zeros_like(value_brgkd)
    dquery = torch.empty_like(query)
    dbias = query.new_empty(0) if bias is None or not wants_dbias else _zeros(bias)
    seen_brhq = lse != -torch.inf
    delta_brhq = (widened(dout) * widened(out)).sum(-1)
    delta_brhq = delta_brhq if dlse is None else delta_brhq - dlse
    delta_brhq = delta_brhq.masked_fill(~seen_brhq, 0)
    lse_brhq = lse.masked_fill(~seen_brhq, torch.inf)
    for some in _some_queries(query, key):
        scores_brhqk = _scores(query[..., some, :], key_brgkd, scale)
        scores_brhqk = _biased(scores_brhqk, some, bias, key_mask, band_start, band_end)
        p_brhqk = (scores_brhqk - lse_brhq[..., some, None]).exp()
        dout_brhqd = widened(dout[..., some, :])
        dvalue += _reduced(p_brhqk, dout_brhqd, dvalue)
        ds_brhqk = _product(dout_brhqd, value_brgkd.mT) - delta_brhq[..., some, None]
        ds_brhqk *= p_brhqk
        if wants_dbias and bias is not None:
            part = dbias[:, :, some] if bias.shape[2] > 1 else dbias
            part += ds_brhqk.sum(1).sum_to_size(part.shape)
        ds_brhqk *= scale
        dkey += _reduced(ds_brhqk, widened(query[..., some, :]), dkey)
        dquery[..., some, :] = _product(ds_brhqk, key_brgkd).to(query.dtype)
    dkey, dvalue = dkey.to(key.dtype), dvalue.to(value.dtype)
    dbias = dbias if bias is None else dbias.to(bias.dtype if wants_dbias else query.dtype)
    return by_position(dquery), by_position(dkey), by_position(dvalue), dbias


def by_position(x: Tensor) -> Tensor:
    """(B, R, heads, T, width) that lies in memory as (B, R, T, heads, width)."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _some_queries(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Slices of the queries; one of them even where there are none."""
    batch, rows, heads, length, _ = query.shape
    step = max(1, _SCORES_AT_ONCE // max(1, batch * rows * heads * key.shape[-2]))
    for start in range(0, max(1, length), step):
        yield slice(start, min(start + step, length))


def _scores(query: Tensor, key_brgkd: Tensor, scale: float) -> Tensor:
    return _product(widened(query) * scale, key_brgkd.mT)


def _biased(
    scores_brhqk: Tensor,
    some: slice,
    bias: Tensor | None,
    key_mask: Tensor | None,
    band_start: int | None,
    band_end: int | None,
) -> Tensor:
    """Scores with the bias added, and minus infinity where a query does not see a key."""
    if bias is not None:
        bias = bias[:, :, some] if bias.shape[2] > 1 else bias
        scores_brhqk = scores_brhqk + bias.unsqueeze(1).to(scores_brhqk.dtype)
    if key_mask is not None:
        scores_brhqk = scores_brhqk.masked_fill(~key_mask[:, :, None, None, :], -torch.inf)
    seen_qk = visible(some, scores_brhqk, band_start, band_end)
    return scores_brhqk if seen_qk is None else scores_brhqk.masked_fill(~seen_qk, -torch.inf)


def visible(
    some: slice, scores: Tensor, band_start: int | None, band_end: int | None
) -> Tensor | None:
    """Which of some queries see which keys (queries, Tk) of the band; None where all do."""
    if band_start is None and band_end is None:
        return None
    queries = torch.arange(some.start, some.stop, device=scores.device)
    apart_qk = torch.arange(scores.shape[-1], device=scores.device) - queries[:, None]
    seen_qk = torch.ones_like(apart_qk, dtype=torch.bool)
    if band_start is not None:
        seen_qk &= apart_qk >= band_start
    if band_end is not None:
        seen_qk &= apart_qk <= band_end
    return seen_qk


def _product(left_brhqx: Tensor, right_brgxy: Tensor) -> Tensor:
    """A product (b, r, h, q, y) in which h // g query heads share each key head."""
    batch, rows, heads, length, _ = left_brhqx.shape
    shared = _grouped(left_brhqx, right_brgxy.shape[2]) @ right_brgxy
    return shared.reshape(batch, rows, heads, length, right_brgxy.shape[-1])


def _reduced(left_brhqk: Tensor, right_brhqd: Tensor, like_brgkd: Tensor) -> Tensor:
    """A product (b, r, g, k, d) summed over queries and over the heads that share a key head."""
    num_shared = like_brgkd.shape[2]
    return _grouped(left_brhqk, num_shared).mT @ _grouped(right_brhqd, num_shared)


def _grouped(x_brhqx: Tensor, num_shared: int) -> Tensor:
    """(b, r, h, q, x) to (b, r, g, h // g * q, x)."""
    batch, rows, heads, length, width = x_brhqx.shape
    return x_brhqx.reshape(batch, rows, num_shared, heads // num_shared * length, width)


def _zeros(bias: Tensor) -> Tensor:
    return torch.zeros(bias.shape, dtype=widened(bias[:0]).dtype, device=bias.device)
