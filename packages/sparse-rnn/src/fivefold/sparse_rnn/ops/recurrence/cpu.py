"""``recurrence`` in C++, see cpu.cpp: nonzeros stay in the caches of the cores that use them.

A matrix is packed once for each pattern of nonzeros (told by its ``col`` tensor), and its values
are taken over again whenever they differ from those of the last call, however they were changed.

Legend: T steps, B sequences, H hidden units, G gates, R = G*H rows, N nonzeros.
"""

import weakref
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fivefold.kernels import native
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS
from fivefold.sparse_rnn.ops.recurrence.reference import previous

SOURCE = Path(__file__).with_suffix(".cpp")

_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = Lock()

# From so many sequences on, reading the rows once for all of them is fastest.
_MANY_SEQUENCES = 8


class Kind(IntEnum):
    """How a matrix is packed; the numbers of ``Kind`` in packing.h."""

    ROWS = 0
    GATHER = 1
    TILES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a packed matrix is made for.

    Attributes:
        kind: see ``Kind``.
        batch: sequences that it is best for, 4 for more.
        transposed: whether the matrix is turned round, for the gradient.
        dtype: of the values.
        num_threads: that share the rows.
    """

    kind: Kind
    batch: int
    transposed: bool
    dtype: torch.dtype
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A packed matrix in the memory of the library.

    Attributes:
        handle: by which the library knows it.
        num_bytes: that are read in every step.
        num_entries: slots times lanes, nonzeros and padding together.
    """

    handle: int
    num_bytes: int
    num_entries: int


def refuses(name: str, *inputs: object) -> str | None:
    """Machines where the file cannot be compiled, and dtypes that no kernel has."""
    found = {each.dtype for each in inputs if isinstance(each, Tensor)}
    unknown = {each for each in found if each.is_floating_point} - native.TYPES.keys()
    if unknown:
        listed = ", ".join(sorted(str(each) for each in unknown))
        return f"its kernel takes float16 to float64, these are {listed}"
    return native.refusal(SOURCE)


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
    num_steps, batch, _ = gates.shape
    hidden, wide = h0.shape[1], _wide_dtype(gates, h0, values)
    values = _values(values, wide)
    packed = _get(values, crow, col, hidden, batch, transposed=False)
    h, c = _state(h0, wide), None if c0 is None else _state(c0, wide)
    y = torch.empty((num_steps, batch, hidden), dtype=wide)
    num_saved = CELLS[cell].num_saved * hidden
    saved_shape = (num_steps, batch, num_saved) if keep and num_saved else (0,)
    saved = torch.empty(saved_shape, dtype=wide)
    native.call(
        native.load(SOURCE).recurrence_forward,
        packed.handle,
        native.TYPES[values.dtype],
        CELLS[cell].number,
        _plain(gates, wide),
        None if bias_n is None else _plain(bias_n, wide),
        None if lengths is None else lengths.contiguous(),
        h,
        c,
        y,
        saved if saved.numel() else None,
        num_steps,
        batch,
        hidden,
        reverse,
    )
    c_n = h0.new_empty(0) if c0 is None or c is None else c.to(c0.dtype)
    kept = saved.to(torch.promote_types(gates.dtype, torch.float32))
    return y.to(gates.dtype), h.to(h0.dtype), c_n, kept


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
    num_steps, batch, hidden = y.shape
    wide = _wide_dtype(y, h0, values)
    packed_values = _values(values, wide)
    packed = _get(packed_values, crow, col, hidden, batch, transposed=True)
    h_before = previous(y.to(wide), h0.to(wide), lengths, reverse).contiguous()
    dh, dc = _state(dh_n, wide), torch.empty(0) if dc_n is None else _state(dc_n, wide)
    dgates = torch.empty((num_steps, batch, CELLS[cell].num_gates * hidden), dtype=wide)
    drows_n = torch.empty_like(y, dtype=wide) if cell == "gru" else None
    native.call(
        native.load(SOURCE).recurrence_backward,
        packed.handle,
        native.TYPES[packed_values.dtype],
        CELLS[cell].number,
        _plain(dy, wide),
        _plain(y, wide),
        _plain(saved, wide),
        h_before,
        None if c0 is None else _plain(c0, wide),
        None if lengths is None else lengths.contiguous(),
        dh,
        dc,
        dgates,
        drows_n,
        num_steps,
        batch,
        hidden,
        reverse,
    )
    dvalues = _products(dgates, drows_n, h_before, crow, col, wide)
    dbias = torch.empty(0) if drows_n is None else drows_n.sum((0, 1))
    return (
        dgates.to(y.dtype),
        dh.to(h0.dtype),
        h0.new_empty(0) if c0 is None else dc.to(c0.dtype),
        dvalues.to(values.dtype),
        dbias.to(values.dtype),
    )


def tiles_are_there() -> bool:
    """Whether this CPU has what windows in registers need: AVX-512 F, BW and VL."""
    return _features()


def _products(
    dgates: Tensor, drows_n: Tensor | None, h: Tensor, crow: Tensor, col: Tensor, wide: torch.dtype
) -> Tensor:
    """The gradient of each nonzero (N,)."""
    out = torch.empty(col.shape, dtype=wide)
    num_steps, batch, hidden = h.shape
    native.call(
        native.load(SOURCE).recurrence_values,
        native.TYPES[wide],
        dgates,
        drows_n,
        h,
        crow,
        col,
        out,
        num_steps * batch,
        dgates.shape[2],
        hidden,
        torch.get_num_threads(),
    )
    return out


def _get(
    values: Tensor, crow: Tensor, col: Tensor, hidden: int, batch: int, *, transposed: bool
) -> Packed:
    """The packed matrix of a pattern, made at its first use, with these values in it."""
    form = choose(values, hidden, batch, transposed=transposed)
    with _lock:
        forms = _packed.setdefault(col, {})
        if form not in forms:
            forms[form] = _pack(crow, col, hidden, form)
        packed: Packed = forms[form]
    library = native.load(SOURCE)
    native.call(
        library.recurrence_refresh,
        packed.handle,
        native.TYPES[values.dtype],
        values,
        torch.get_num_threads(),
    )
    return packed


def choose(values: Tensor, hidden: int, batch: int, *, transposed: bool) -> Form:
    """How a matrix is best packed for so many sequences.

    Args:
        values: (N,).
        hidden: H.
        batch: B.
        transposed: whether it is for the gradient.
    """
    kind = Kind.GATHER
    if batch >= _MANY_SEQUENCES:
        kind = Kind.ROWS
    elif values.dtype != torch.float64 and _features():
        kind = Kind.TILES
    return Form(
        kind=kind,
        batch=min(batch, 4) if kind == Kind.TILES else 0,
        transposed=transposed,
        dtype=values.dtype,
        num_threads=torch.get_num_threads(),
    )


def _pack(crow: Tensor, col: Tensor, hidden: int, form: Form) -> Packed:
    described = torch.zeros(4, dtype=torch.int64)
    rows = crow.shape[0] - 1
    library = native.load(SOURCE)
    native.call(
        library.recurrence_pack,
        crow,
        col,
        rows,
        hidden,
        rows // max(hidden, 1),
        form.transposed,
        native.TYPES[form.dtype],
        int(form.kind),
        form.batch,
        form.num_threads,
        described,
    )
    handle, num_bytes, num_slots, lanes = described.tolist()
    if not handle:
        raise MemoryError(f"a matrix of {col.shape[0]} nonzeros could not be packed")
    packed = Packed(handle=handle, num_bytes=num_bytes, num_entries=num_slots * lanes)
    weakref.finalize(col, _free, handle)
    return packed


def _free(handle: int) -> None:
    native.call(native.load(SOURCE).recurrence_free, handle)


@cache
def _features() -> bool:
    tiles = torch.zeros(1, dtype=torch.int64)
    native.call(native.load(SOURCE).recurrence_features, tiles)
    return bool(tiles.item())


def _wide_dtype(*tensors: Any) -> torch.dtype:
    """In what is computed: float64 where anything is, else float32."""
    doubles = any(each.dtype == torch.float64 for each in tensors)
    return torch.float64 if doubles else torch.float32


def _values(values: Tensor, wide: torch.dtype) -> Tensor:
    """Values as they are packed: in their own dtype where that is computed in ``wide``."""
    return _plain(values, wide if wide == torch.float64 else values.dtype)


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def _state(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that the kernel replaces by what comes after."""
    return torch.empty(x.shape, dtype=dtype).copy_(x.detach())
