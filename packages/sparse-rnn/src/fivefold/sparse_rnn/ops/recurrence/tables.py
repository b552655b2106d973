"""A sparse matrix as tables for the persistent kernel: which thread has which nonzero, and where.

Legend: R = G*H rows, H hidden units, G gates, N nonzeros; K blocks, P pairs of a thread, Q threads
of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fivefold.sparse_rnn import layout
from fivefold.sparse_rnn.arrangement import Arrangement, Run, arrange, num_blocks
from fivefold.sparse_rnn.ops.recurrence.reference import rows_of
from fivefold.sparse_rnn.resident import Kernel


class Matrix(NamedTuple):
    """Nonzeros as the kernel multiplies them: forwards as they are, backwards turned gate by gate.

    Backwards row ``g*H + u`` has what column u of gate g had, so that a column of any row is a unit
    (0 to H - 1) in both directions.

    Attributes:
        crow: (R + 1,) int64, where rows begin.
        col: (N,) int64, the columns.
        source: (N,) int64, the number of each nonzero in the layer's parameter.
    """

    crow: Tensor
    col: Tensor
    source: Tensor

    @classmethod
    def of(cls, crow: Tensor, col: Tensor, hidden: int, *, turned: bool) -> Self:
        """The nonzeros (N,) with their columns, of rows that begin at ``crow`` (R + 1,)."""
        column = col.long()
        if not turned:
            return cls(crow.long(), column, torch.arange(col.shape[0], device=col.device))
        row = rows_of(crow, col)
        new_row = row // hidden * hidden + column
        source = new_row.argsort(stable=True)
        begin = torch.zeros_like(crow, dtype=torch.int64)
        begin[1:] = new_row.bincount(minlength=crow.shape[0] - 1).cumsum(0)
        return cls(begin, (row % hidden)[source], source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What the kernel is given of a matrix; int32.

    Attributes:
        source: (K, P, Q), the number of each nonzero, -1 for padding.
        offsets: (K, P, Q), where its column is in the vector, in bytes.
        units: (K, units), the hidden units of each block, -1 for none.
        positions: (K, units), where each of them is in the vector.
        rows: (K, units, G), where the sums of their rows are: first | count << 16.
        bases: (K, runs, warps), backwards, bytes that come on top of a run's offsets.
        order: (H,), the unit that is at each place of the vector.
    """

    source: Tensor
    offsets: Tensor
    units: Tensor
    positions: Tensor
    rows: Tensor
    bases: Tensor
    order: Tensor


def arranged(matrix: Matrix, hidden: int, num_sms: int, num_warps: int) -> Arrangement:
    """Rows dealt to blocks and warps."""
    slots = layout.num_slots(matrix.crow).tolist()
    return arrange(slots, hidden, num_blocks(sum(slots), hidden, num_sms, num_warps), num_warps)


def tables(
    matrix: Matrix, arrangement: Arrangement, kernel: Kernel, *, reorder: bool, permute: bool
) -> Tables:
    """The tables of a matrix.

    Args:
        matrix: its nonzeros.
        arrangement: of its rows.
        kernel: that takes the tables.
        reorder: choose the order of each row's nonzeros so that few meet in a bank.
        permute: choose the places of units so that few of a row lie in one bank.
    """
    device, size = matrix.col.device, kernel.element_bytes
    order = _order(matrix, kernel, permute=permute)
    position = _inverse(order)
    place_of = layout.reorder if reorder else lambda crow, *_: layout.in_order(crow)
    column = position[matrix.col]
    target = _targets(matrix.crow, place_of(matrix.crow, column, size), arrangement)
    shape = (len(arrangement.units), kernel.pairs, kernel.num_threads)
    source = _scattered(target, matrix.source, shape)
    offsets = _scattered(target, column * size, shape)
    units = _padded(arrangement.units, kernel.most_units, -1).to(device)
    positions = torch.where(units < 0, 0, position[units.clamp(min=0)])
    return Tables(
        source=source.int(),
        offsets=_fill(offsets, layout.num_banks(size)).int(),
        units=units.int(),
        positions=positions.int(),
        rows=_rows(arrangement, kernel).int().to(device),
        bases=_bases(arrangement, kernel).int().to(device),
        order=order,
    )


def _order(matrix: Matrix, kernel: Kernel, *, permute: bool) -> Tensor:
    """The unit (H,) at each place of the vector."""
    device, size = matrix.col.device, kernel.element_bytes
    if permute:
        found = layout.permute_units(matrix.crow, matrix.col, kernel.hidden, size)
        return found.to(device)
    # Rows pruned evenly are even over the banks in one of these orders.
    orders = [torch.arange(kernel.hidden), layout.place_blocks(kernel.hidden, size)]
    placed = [order.to(device) for order in orders]
    waves = [
        int(layout.fullest(matrix.crow, _inverse(order)[matrix.col], size).sum())
        for order in placed
    ]
    return placed[waves.index(min(waves))]


def _inverse(order: Tensor) -> Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.shape[0], device=order.device)
    return position


def _targets(crow: Tensor, place: Tensor, arrangement: Arrangement) -> Tensor:
    """The place (N,) in (K, P, Q) of each nonzero."""
    row = rows_of(crow, place)
    num_slots = layout.num_slots(crow)
    first_slot = torch.cat([num_slots.new_zeros(1), num_slots.cumsum(0)])
    slot = _slots(arrangement, first_slot)
    lane = place % layout.LANES
    return slot[first_slot[row] + place // layout.LANES] * layout.LANES + lane


def _slots(arrangement: Arrangement, first_slot: Tensor) -> Tensor:
    """Of each row's slots one after the other, which they are of (K, P, warps)."""
    device, warps = first_slot.device, arrangement.num_warps
    runs = torch.tensor(arrangement.runs, dtype=torch.int64, device=device).view(
        -1, len(Run._fields)
    )
    block, place, row, first, count = runs.unbind(1)
    shape = torch.tensor(arrangement.shape, dtype=torch.int64, device=device)
    begin = shape.cumsum(0) - shape
    # Each run's slots, one by one.
    run = torch.arange(runs.shape[0], device=device).repeat_interleave(count)
    step = torch.arange(run.shape[0], device=device) - (count.cumsum(0) - count)[run]
    pair = begin[place // warps][run] + step
    found = torch.empty(int(first_slot[-1]), dtype=torch.int64, device=device)
    to = (block[run] * arrangement.num_slots + pair) * warps + (place % warps)[run]
    found[first_slot[row[run]] + first[run] + step] = to
    return found


def _scattered(target: Tensor, values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    flat = torch.full((shape[0] * shape[1] * shape[2],), -1, device=values.device)
    flat[target] = values
    return flat.view(shape)


def _fill(offsets: Tensor, lanes: int) -> Tensor:
    """Let lanes without a nonzero read what another lane of their phase reads, for nothing."""
    phases = offsets.reshape(-1, lanes)
    other = phases.amax(1, keepdim=True).clamp(min=0) if phases.numel() else phases
    return torch.where(phases < 0, other, phases).view(offsets.shape)


def _padded(lists: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([each + [value] * (length - len(each)) for each in lists])


def _rows(arrangement: Arrangement, kernel: Kernel) -> Tensor:
    entries = [first | count << 16 for first, count in arrangement.sums]
    of_unit = torch.tensor([*entries, *[0] * kernel.num_gates]).view(-1)
    units = _padded(arrangement.units, kernel.most_units, -1).unsqueeze(-1)
    rows = torch.arange(kernel.num_gates) * kernel.hidden + units
    return torch.where(units < 0, 0, of_unit[rows.clamp(min=0)])


def _bases(arrangement: Arrangement, kernel: Kernel) -> Tensor:
    places = len(arrangement.shape) * arrangement.num_warps
    bases = torch.zeros((len(arrangement.units), places), dtype=torch.int64)
    if kernel.backward:
        for run in arrangement.runs:
            gate = run.row // kernel.hidden
            bases[run.block, run.place] = gate * kernel.hidden * kernel.element_bytes
    return bases.view(len(arrangement.units), -1, arrangement.num_warps)
