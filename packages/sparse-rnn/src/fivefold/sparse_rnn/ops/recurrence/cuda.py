"""``recurrence`` in CUDA C++, see cuda.cu: one launch for all steps, nonzeros on the chip.

A pattern of nonzeros (told by its ``col`` tensor) is laid out once for a batch; its values are
packed anew in every call, however they were changed. Who waits in vain for another block gives up
after ``Options.patience`` looks: the results are NaN and the next call, or ``check``, raises.

Legend: T steps, B sequences, H hidden units, G gates, R = G*H rows, N nonzeros, S saved values,
C numbers of a vector (H, backwards R), W sequences side by side, K blocks, P pairs of a thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fivefold.kernels import cuda_route
from fivefold.kernels.launch import num_sms
from fivefold.sparse_rnn.arrangement import NUM_WARPS, arrange, num_blocks
from fivefold.sparse_rnn.errors import SparseRNNTimeoutError
from fivefold.sparse_rnn.layout import LANES
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS
from fivefold.sparse_rnn.ops.recurrence.reference import previous
from fivefold.sparse_rnn.ops.recurrence.tables import Matrix, Tables, arranged, tables
from fivefold.sparse_rnn.resident import Kernel, fit

SOURCE = Path(__file__).with_suffix(".cu")

_KINDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_DTYPES = {name: dtype for dtype, name in _KINDS.items()}

# Of a block on an H100, which recorded launches are made for.
_RECORDED_SHARED_BYTES = 232448

# What waits to be read of all steps' slots; longer sequences take several launches.
_SLOT_BYTES = 1 << 28

# The bit pattern of a word that was not published yet.
_EMPTY = -1

_PRODUCT_ROWS = 8

_resident: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the kernel runs; the defaults are best, the others are there to compare.

    Attributes:
        exchange: how blocks get each other's states: "lamport", each word as soon as it is there,
            or "barrier", one of the whole grid in every step.
        reorder: whether each row's nonzeros are put in an order with few bank conflicts.
        permute: whether units are placed so that rows spread over the banks; takes seconds a layer.
        width: sequences side by side; None is as many as one access brings.
        values: dtype that values are rounded to, "float16" or "bfloat16", which take half the
            registers of "float32"; None keeps that of the layer.
        patience: how often a block looks for a word of another before it gives up.
    """

    exchange: Literal["lamport", "barrier"] = "lamport"
    reorder: bool = True
    permute: bool = False
    width: int | None = None
    values: str | None = None
    patience: int = 1 << 22


_options: ContextVar[Options] = ContextVar("_options", default=Options())  # noqa: B039


@contextmanager
def using(options: Options) -> Iterator[None]:
    """Run this backend with other options."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a matrix is laid out for."""

    cell: str
    hidden: int
    batch: int
    backward: bool
    source: str
    num_sms: int
    shared_bytes: int
    options: Options


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """A matrix laid out for a device, or why it has no room there."""

    kernel: Kernel
    tables: Tables | None
    refusal: str | None

    @property
    def program(self) -> cuda_route.Program:
        """The kernel's file with its constants."""
        return cuda_route.load(SOURCE, defines=self.kernel.defines())


def refuses(name: str, *inputs: Any) -> str | None:
    """Old GPUs, float64, and matrices that have no room on the chip."""
    doubles = [x for x in inputs if isinstance(x, Tensor) and x.dtype == torch.float64]
    if doubles:
        return "its kernel computes in float32, these are float64"
    backward = name == "recurrence_backward"
    h0, values, crow, col = inputs[5 if backward else 1], *inputs[7 if backward else 3 :][:3]
    if values.dtype not in _KINDS:
        return f"its kernel takes values in {', '.join(map(str, _KINDS))}, these are {values.dtype}"
    if values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 0):
        return "its kernel needs a GPU of compute capability 8.0 or more"
    cell = inputs[11] if backward else inputs[8]
    return resident(values, crow, col, h0, cell, backward=backward).refusal


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
    hidden = h0.shape[1]
    matrix = resident(values, crow, col, h0, cell, backward=False)
    words = _pack(matrix, values)
    h, c = _state(h0), None if c0 is None else _state(c0)
    x = _plain(gates)
    y = x.new_empty((num_steps, batch, hidden))
    num_saved = CELLS[cell].num_saved * hidden if keep else 0
    saved = x.new_empty((num_steps, batch, num_saved) if num_saved else (0,))
    for window in _windows(matrix.kernel, num_steps, batch, reverse):
        _start(
            matrix,
            words,
            _first_slot(matrix, h, h, window),
            x[window],
            None if bias_n is None else _plain(bias_n),
            _from(lengths, window),
            h,
            c,
            y[window],
            saved[window] if num_saved else None,
            steps=window.stop - window.start,
            batch=batch,
            descending=reverse,
        )
    c_n = h0.new_empty(0) if c0 is None or c is None else c.to(c0.dtype)
    return y.to(gates.dtype), h.to(h0.dtype), c_n, saved


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
    matrix = resident(values, crow, col, h0, cell, backward=True)
    words = _pack(matrix, values)
    dh, dc = _state(dh_n), None if dc_n is None else _state(dc_n)
    outputs, before = _plain(y), previous(_plain(y), _plain(h0), lengths, reverse).contiguous()
    dgates = outputs.new_empty((num_steps, batch, crow.shape[0] - 1))
    drows_n = torch.empty_like(outputs) if cell == "gru" else None
    inputs = [_plain(dy), outputs, saved if saved.numel() else None, before]
    if c0 is not None:
        c = saved[..., 4 * hidden :]
        inputs[3] = previous(c, _plain(c0), lengths, reverse).contiguous()
    for window in _windows(matrix.kernel, num_steps, batch, not reverse):
        _start(
            matrix,
            words,
            _first_slot(matrix, None, dh, window),
            *(None if x is None else x[window] for x in inputs),
            _from(lengths, window),
            dh,
            dc,
            dgates[window],
            None if drows_n is None else drows_n[window],
            steps=window.stop - window.start,
            batch=batch,
            descending=not reverse,
        )
    dvalues = _products(dgates, drows_n, before, crow, col)
    return (
        dgates.to(y.dtype),
        dh.to(h0.dtype),
        h0.new_empty(0) if c0 is None or dc is None else dc.to(c0.dtype),
        dvalues.to(values.dtype),
        (values.new_empty(0) if drows_n is None else drows_n.sum((0, 1))).to(values.dtype),
    )


def check(device: torch.device | int | None = None) -> None:
    """Wait for a device and raise if a kernel of this backend gave up on it.

    Raises:
        SparseRNNTimeoutError: one did.
    """
    torch.cuda.synchronize(device)
    index = None if device is None else torch.device(device).index
    _raise_if(_told(torch.cuda.current_device() if index is None else index))


def resident(
    values: Tensor, crow: Tensor, col: Tensor, h0: Tensor, cell: str, *, backward: bool
) -> Resident:
    """A pattern's matrix laid out for the device that it is on, made at its first use."""
    form = Form(
        cell=cell,
        hidden=h0.shape[1],
        batch=h0.shape[0],
        backward=backward,
        source=_KINDS[values.dtype],
        num_sms=num_sms(values),
        shared_bytes=_shared_bytes(values),
        options=_options.get(),
    )
    if col.is_meta:
        return lay_out(crow, col, form)
    forms = _resident.setdefault(col, {})
    if form not in forms:
        forms[form] = lay_out(crow, col, form)
    found: Resident = forms[form]
    return found


def lay_out(crow: Tensor, col: Tensor, form: Form) -> Resident:
    """Lay a matrix out; one on ``meta`` as if its rows had equally many nonzeros."""
    gates, options = CELLS[form.cell].num_gates, form.options
    matrix = None
    if col.is_meta:
        rows = gates * form.hidden
        slots = [-(-col.shape[0] // max(rows, 1) // LANES)] * rows
        blocks = num_blocks(sum(slots), form.hidden, form.num_sms, NUM_WARPS)
        arrangement = arrange(slots, form.hidden, blocks, NUM_WARPS)
    else:
        matrix = Matrix.of(crow, col, form.hidden, turned=form.backward)
        arrangement = arranged(matrix, form.hidden, form.num_sms, NUM_WARPS)
    kernel, refusal = fit(
        arrangement,
        cell=form.cell,
        backward=form.backward,
        barrier=options.exchange == "barrier",
        hidden=form.hidden,
        batch=form.batch,
        kind=options.values or form.source,
        source=form.source,
        shared_bytes=form.shared_bytes,
        width=options.width,
    )
    if refusal is not None:
        return Resident(kernel=kernel, tables=None, refusal=refusal)
    if matrix is None:
        return Resident(
            kernel=kernel, tables=_empty_tables(kernel, len(arrangement.units)), refusal=None
        )
    made = tables(matrix, arrangement, kernel, reorder=options.reorder, permute=options.permute)
    return Resident(kernel=kernel, tables=made, refusal=None)


def _pack(matrix: Resident, values: Tensor) -> Tensor:
    """The words (K, P, words, threads) of the values as they are now."""
    made, kernel = _tables_of(matrix), matrix.kernel
    blocks, pairs, threads = made.source.shape
    words = made.source.new_empty((blocks, pairs, 1 + kernel.wide, threads))
    count = made.source.numel()
    cuda_route.launch(
        matrix.program,
        "recurrence_pack",
        (-(-count // threads),),
        (threads,),
        values.contiguous(),
        made.source,
        made.offsets,
        words,
        count,
    )
    return words


def _start(
    matrix: Resident,
    words: Tensor,
    slots: Tensor,
    *tensors: Tensor | None,
    steps: int,
    batch: int,
    descending: bool,
) -> None:
    made, kernel = _tables_of(matrix), matrix.kernel
    told = _told(None if words.is_meta else words.get_device())
    _raise_if(told)
    cuda_route.launch(
        matrix.program,
        "recurrence_backward" if kernel.backward else "recurrence_forward",
        (made.units.shape[0],),
        (kernel.num_threads,),
        words,
        made.units,
        made.positions,
        made.rows,
        *([made.bases] if kernel.backward else []),
        slots,
        words.new_zeros(2),
        told,
        *tensors,
        steps,
        batch,
        descending,
        _options.get().patience,
        shared_bytes=kernel.shared_bytes(batch),
        cooperative=True,
    )


def _first_slot(matrix: Resident, h: Tensor | None, like: Tensor, window: slice) -> Tensor:
    """Slots (steps + 1, groups, words) of a launch, int32: the first is there, the others empty.

    The first has the state ``h``, or zeros for states of the shape and device of ``like``.
    """
    kernel = matrix.kernel
    batch = like.shape[0]
    groups = kernel.num_groups(batch)
    shape = (window.stop - window.start + 1, groups, kernel.vector_words)
    slots = torch.full(shape, _EMPTY, dtype=torch.int32, device=like.device)
    slots[0] = 0
    slots[:, :, kernel.columns * kernel.width :] = 0
    if h is None:
        return slots
    # A NaN may have the bits of an empty word.
    clean = torch.where(h.isnan(), torch.nan, h).index_select(1, _tables_of(matrix).order)
    padded = h.new_zeros((groups * kernel.width, kernel.hidden))
    padded[:batch] = clean
    first = padded.view(groups, kernel.width, kernel.hidden).transpose(1, 2).flatten(1)
    slots[0, :, : kernel.columns * kernel.width] = first.contiguous().view(torch.int32)
    return slots


def _windows(kernel: Kernel, num_steps: int, batch: int, descending: bool) -> Iterator[slice]:
    """Steps of each launch, in the order in which they are taken."""
    step_bytes = kernel.num_groups(batch) * kernel.vector_words * 4
    most = max(1, _SLOT_BYTES // max(step_bytes, 1))
    starts = range(0, num_steps, most)
    for start in reversed(starts) if descending else starts:
        yield slice(start, min(start + most, num_steps))


def _products(
    dgates: Tensor, drows_n: Tensor | None, before: Tensor, crow: Tensor, col: Tensor
) -> Tensor:
    """The gradient (N,) of each nonzero: of its row's gradients with its column's states."""
    hidden = before.shape[2]
    drows = dgates.flatten(0, 1)
    if drows_n is not None:
        drows = torch.cat([drows[:, : 2 * hidden], drows_n.flatten(0, 1)], 1)
    # Steps side by side, in whole 16 bytes.
    count = -(-drows.shape[0] // 4) * 4
    left = drows.new_zeros((drows.shape[1], count))
    right = drows.new_zeros((hidden, count))
    left[:, : drows.shape[0]] = drows.T
    right[:, : drows.shape[0]] = before.flatten(0, 1).T
    out = drows.new_empty(col.shape)
    cuda_route.launch(
        cuda_route.load(SOURCE.with_name("products.cu")),
        "products",
        (-(-left.shape[0] // _PRODUCT_ROWS),),
        (LANES * _PRODUCT_ROWS,),
        left,
        right,
        crow,
        col,
        out,
        left.shape[0],
        count,
    )
    return out


def _empty_tables(kernel: Kernel, blocks: int) -> Tables:
    """Tables of the right shapes and no values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty((blocks, *shape), dtype=torch.int32, device="meta")

    return Tables(
        source=empty(kernel.pairs, kernel.num_threads),
        offsets=empty(kernel.pairs, kernel.num_threads),
        units=empty(kernel.most_units),
        positions=empty(kernel.most_units),
        rows=empty(kernel.most_units, kernel.num_gates),
        bases=empty(len(kernel.shape), kernel.num_warps),
        order=torch.empty(kernel.hidden, dtype=torch.int64, device="meta"),
    )


def _tables_of(matrix: Resident) -> Tables:
    if matrix.tables is None:
        raise ValueError(f"the matrix has no room: {matrix.refusal}")
    return matrix.tables


def _shared_bytes(x: Tensor) -> int:
    if x.is_cuda:
        # torch has it and its types do not say so.
        properties: Any = torch.cuda.get_device_properties(x.device)
        found: int = properties.shared_memory_per_block_optin
        return found
    return _RECORDED_SHARED_BYTES


@cache
def _told(index: int | None) -> Tensor:
    """A word of the host's memory that kernels of a device write to when they give up."""
    if index is None:
        return torch.zeros(1, dtype=torch.int32, device="meta")
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


def _raise_if(told: Tensor) -> None:
    if not told.is_meta and told.item():
        told.zero_()
        raise SparseRNNTimeoutError(
            "a recurrence on this GPU gave up: a block looked for another's state more than "
            f"{_options.get().patience} times (Options.patience) and it did not come. The results "
            "of that call are NaN. Is the GPU shared with other processes that hold it?"
        )


def _from(lengths: Tensor | None, window: slice) -> Tensor | None:
    """Lengths (B,) counted from a window's first step."""
    return None if lengths is None else (lengths - window.start).contiguous()


def _plain(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _state(x: Tensor) -> Tensor:
    """A copy that the kernel replaces by what comes after."""
    copied = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return copied.copy_(x.detach())
