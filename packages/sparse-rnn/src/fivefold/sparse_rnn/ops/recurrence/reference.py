"""The specification of ``recurrence`` in plain PyTorch, and its gradient written out.

Legend: T steps, B sequences, H hidden units, G gates, R = G*H rows, N nonzeros, S saved values.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fivefold.sparse_rnn.ops.recurrence.cells import CELLS


def recurrence_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias_n: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (T, B, H), last h and c (B, H), and what the gradient needs (T, B, S*H)."""
    weight_rh = dense(_wide(values), crow, col, h0.shape[1])
    h_bh, c_bh = _wide(h0), None if c0 is None else _wide(c0)
    y: list[Tensor] = [h_bh] * gates.shape[0]
    saved: list[Tensor] = [h_bh] * gates.shape[0]
    for t, active_b1 in _steps(gates.shape[0], lengths, reverse):
        product_br = h_bh @ weight_rh.T
        new_bh, new_c_bh, saved[t] = _step(cell, _wide(gates[t]), product_br, bias_n, h_bh, c_bh)
        y[t] = new_bh if active_b1 is None else torch.where(active_b1, new_bh, 0.0)
        h_bh = new_bh if active_b1 is None else torch.where(active_b1, new_bh, h_bh)
        if c_bh is not None and new_c_bh is not None:
            c_bh = new_c_bh if active_b1 is None else torch.where(active_b1, new_c_bh, c_bh)
    y_tbh = torch.stack(y) if y else gates.new_empty((0, *h0.shape))
    kept = torch.stack(saved) if keep and y and CELLS[cell].num_saved else _wide(gates.new_empty(0))
    c_n = h0.new_empty(0) if c0 is None or c_bh is None else _own(c_bh.to(c0.dtype), c0)
    return y_tbh.to(gates.dtype), _own(h_bh.to(h0.dtype), h0), c_n, kept


def recurrence_backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, h0, c0, values and bias_n; empty (0,) where there is none."""
    num_steps, _, hidden = y.shape
    weight_rh = dense(_wide(values), crow, col, hidden)
    dh_bh, dc_bh = _wide(dh_n), None if dc_n is None else _wide(dc_n)
    dgates_tbr = _wide(y.new_zeros((num_steps, y.shape[1], weight_rh.shape[0])))
    # What went into the product differs from what came from outside in the n of a GRU alone.
    drows_tbr = torch.zeros_like(dgates_tbr) if cell == "gru" else dgates_tbr
    h_before_tbh = previous(y, h0, lengths, reverse)
    for t, active_b1 in _steps(num_steps, lengths, not reverse):
        total_bh = dh_bh + _wide(dy[t])
        kept_bs = saved[t] if saved.numel() else None
        c_before_bh = _c_before(saved, c0, t, lengths, reverse)
        dgate_br, drow_br, dh_new_bh, dc_new_bh = _step_backward(
            cell, total_bh, dc_bh, _wide(y[t]), kept_bs, h_before_tbh[t], c_before_bh
        )
        dh_new_bh = dh_new_bh + drow_br @ weight_rh
        if active_b1 is not None:
            dgate_br, drow_br = dgate_br * active_b1, drow_br * active_b1
            dh_new_bh = torch.where(active_b1, dh_new_bh, dh_bh)
            if dc_bh is not None and dc_new_bh is not None:
                dc_new_bh = torch.where(active_b1, dc_new_bh, dc_bh)
        dgates_tbr[t], drows_tbr[t] = dgate_br, drow_br
        dh_bh, dc_bh = dh_new_bh, dc_new_bh
    row_n = rows_of(crow, col)
    dweight_rh = drows_tbr.flatten(0, 1).T @ h_before_tbh.flatten(0, 1)
    dbias = drows_tbr[..., 2 * hidden :].sum((0, 1)) if cell == "gru" else values.new_empty(0)
    return (
        _own(dgates_tbr.to(y.dtype), saved),
        _own(dh_bh.to(h0.dtype), dh_n),
        h0.new_empty(0) if c0 is None or dc_bh is None else _own(dc_bh.to(c0.dtype), dc_n),
        dweight_rh[row_n, col.long()].to(values.dtype),
        dbias.to(values.dtype),
    )


def dense(values: Tensor, crow: Tensor, col: Tensor, hidden: int) -> Tensor:
    """The matrix (R, H) that the nonzeros are of."""
    flat = values.new_zeros((crow.shape[0] - 1) * hidden)
    at = rows_of(crow, col) * hidden + col.long()
    return flat.index_put((at,), values).view(crow.shape[0] - 1, hidden)


def rows_of(crow: Tensor, col: Tensor) -> Tensor:
    """The row (N,) of each nonzero."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff().long(), output_size=col.shape[0])


def previous(y: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state h (T, B, H) that each step began with."""
    wide, first = _wide(y), _wide(h0).unsqueeze(0)
    if not reverse:
        return torch.cat([first, wide[:-1]])
    before = torch.cat([wide[1:], first])
    if lengths is None:
        return before
    # A sequence's last step is the first in this direction: it begins with h0.
    steps = torch.arange(y.shape[0], device=y.device)
    starts = (steps[:, None] == lengths[None] - 1).unsqueeze(-1)
    return torch.where(starts, first, before)


def _step(
    cell: str,
    gates_br: Tensor,
    product_br: Tensor,
    bias_n: Tensor | None,
    h_bh: Tensor,
    c_bh: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The new h and c and what the gradient needs of the step (B, S*H)."""
    if cell == "gru":
        return _gru(gates_br, product_br, bias_n, h_bh)
    total_br = gates_br + product_br
    if cell == "lstm" and c_bh is not None:
        i, f, g, o = total_br.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new_bh = f * c_bh + i * g
        return o * c_new_bh.tanh(), c_new_bh, torch.cat([i, f, g, o, c_new_bh], -1)
    h_new_bh = total_br.tanh() if cell == "rnn_tanh" else total_br.relu()
    return h_new_bh, None, h_new_bh


def _gru(
    gates_br: Tensor, product_br: Tensor, bias_n: Tensor | None, h_bh: Tensor
) -> tuple[Tensor, None, Tensor]:
    r, z, n = gates_br.chunk(3, -1)
    product_r, product_z, product_n = product_br.chunk(3, -1)
    if bias_n is not None:
        product_n = product_n + _wide(bias_n)
    r, z = (r + product_r).sigmoid(), (z + product_z).sigmoid()
    n = (n + r * product_n).tanh()
    return n + z * (h_bh - n), None, torch.cat([r, z, n, product_n], -1)


def _step_backward(
    cell: str,
    dh_bh: Tensor,
    dc_bh: Tensor | None,
    y_bh: Tensor,
    saved_bs: Tensor | None,
    h_bh: Tensor,
    c_bh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of gates and of the product (B, R), and of h and c before, without the product."""
    none_bh = torch.zeros_like(dh_bh)
    if saved_bs is None:
        slope = 1 - y_bh.square() if cell == "rnn_tanh" else (y_bh > 0).to(y_bh.dtype)
        return dh_bh * slope, dh_bh * slope, none_bh, None
    if cell == "gru":
        r, z, n, product_n = saved_bs.chunk(4, -1)
        dn = dh_bh * (1 - z) * (1 - n.square())
        dz = dh_bh * (h_bh - n) * z * (1 - z)
        dr = dn * product_n * r * (1 - r)
        return torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), dh_bh * z, None
    i, f, g, o, c_new_bh = saved_bs.chunk(5, -1)
    tanh_bh = c_new_bh.tanh()
    dc_new_bh = dh_bh * o * (1 - tanh_bh.square())
    if dc_bh is not None:
        dc_new_bh = dc_new_bh + dc_bh
    before_bh = none_bh if c_bh is None else c_bh
    dgate_br = torch.cat(
        [
            dc_new_bh * g * i * (1 - i),
            dc_new_bh * before_bh * f * (1 - f),
            dc_new_bh * i * (1 - g.square()),
            dh_bh * tanh_bh * o * (1 - o),
        ],
        -1,
    )
    return dgate_br, dgate_br, none_bh, dc_new_bh * f


def _c_before(
    saved: Tensor, c0: Tensor | None, t: int, lengths: Tensor | None, reverse: bool
) -> Tensor | None:
    """The cell state (B, H) that step t began with."""
    if c0 is None:
        return None
    first_bh = _wide(c0)
    before = t + 1 if reverse else t - 1
    if not 0 <= before < saved.shape[0]:
        return first_bh
    c_bh = saved[before].chunk(5, -1)[4]
    if reverse and lengths is not None:
        return torch.where((lengths == t + 1).unsqueeze(-1), first_bh, c_bh)
    return c_bh


def _steps(
    num_steps: int, lengths: Tensor | None, reverse: bool
) -> Iterator[tuple[int, Tensor | None]]:
    """Each step and which sequences (B, 1) are still or already running; None is all."""
    for t in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        yield t, None if lengths is None else (lengths > t).unsqueeze(-1)


def _own(x: Tensor, source: Tensor | None) -> Tensor:
    """Not a view of an input: an op returns memory of its own."""
    return x.clone() if source is not None and x.data_ptr() == source.data_ptr() else x


def _wide(x: Tensor) -> Tensor:
    """In the dtype that sums are made in: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
