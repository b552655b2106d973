"""Where nonzeros go on a GPU: which lane takes which, which bank of shared memory a unit lies in.

A warp of 32 lanes takes a row, 32 nonzeros at a time, and every lane reads its column's state from
shared memory, which serves each of 32 banks (of 4 bytes) once in a wave. A state of 4, 8 or 16
bytes (a batch side by side) lets 32, 16 or 8 lanes be served at once, a phase, if their columns lie
in different banks. The order of a row's nonzeros is free, so it is chosen to that end: Zhu et al.,
arXiv 1804.10223, appendix A. Which column lies in which bank is free too, one permutation of the
hidden units for the whole matrix.

Legend: R rows, H columns, N nonzeros, P phases of a row, K banks.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from fivefold.sparse_rnn.errors import SparseRNNInputError

LANES = 32
_BANK_BYTES = 4


def num_banks(element_bytes: int) -> int:
    """How many columns of so many bytes lie side by side in all banks: lanes of a phase.

    Raises:
        SparseRNNInputError: other than 4, 8 or 16 bytes.
    """
    if element_bytes not in (4, 8, 16):
        raise SparseRNNInputError(f"a lane reads 4, 8 or 16 bytes at once, found {element_bytes}")
    return LANES * _BANK_BYTES // element_bytes


def num_slots(crow: Tensor) -> Tensor:
    """Accesses (R,) of a whole warp that each row takes."""
    return (crow.diff().long() + LANES - 1) // LANES


def waves(crow: Tensor, col: Tensor, place: Tensor, element_bytes: int) -> Tensor:
    """Waves (R,) of shared memory that each row takes; the simulator.

    Args:
        crow: (R + 1,), where rows begin.
        col: (N,), the columns.
        place: (N,), lane + 32 * access of each nonzero within its row.
        element_bytes: of a column's state.
    """
    banks = num_banks(element_bytes)
    row = _rows(crow)
    first_phase = _first_phases(crow, banks)
    phase = first_phase[row] + place.long() // banks
    total = int(first_phase[-1])
    # Lanes of a phase that read the same column are served together.
    once = torch.unique(torch.stack([phase, col.long()]), dim=1)
    counts = torch.bincount(once[0] * banks + once[1] % banks, minlength=total * banks)
    longest = counts.view(total, banks).amax(1) if total else counts
    cumulative = torch.cat([longest.new_zeros(1), longest.cumsum(0)])
    return cumulative[first_phase[1:]] - cumulative[first_phase[:-1]]


def ratio(crow: Tensor, col: Tensor, place: Tensor, element_bytes: int) -> float:
    """Waves of all rows over the fewest that could be, ``ceil(nonzeros / lanes of a phase)``."""
    banks = num_banks(element_bytes)
    fewest = (crow.diff().long() + banks - 1) // banks
    return float(waves(crow, col, place, element_bytes).sum() / fewest.sum().clamp(min=1))


def in_order(crow: Tensor) -> Tensor:
    """Places (N,) of nonzeros that are taken as they come."""
    return torch.arange(int(crow[-1]), device=crow.device) - crow[:-1].long()[_rows(crow)]


def reorder(crow: Tensor, col: Tensor, element_bytes: int) -> Tensor:
    """Places (N,) that need few waves, each row by itself, without any access more.

    A bank with more nonzeros than the row has phases is used twice in some of them, and one with
    fewer stays out of these; so a row takes as many waves as its fullest bank has nonzeros wherever
    the lanes of its phases allow it.
    """
    banks = num_banks(element_bytes)
    row, bank = _rows(crow), col.long() % banks
    phases = num_slots(crow) * (LANES // banks)
    count = torch.bincount(row * banks + bank, minlength=(crow.shape[0] - 1) * banks)
    rank = _rank(row * banks + bank)
    room = phases[row]
    full = count[row * banks + bank] >= room
    surplus = rank >= room
    phase = torch.where(full, rank, room - 1 - rank)
    phase[surplus] = _place_surplus(row, phase, surplus, rank, phases, banks)
    return phase * banks + _rank(_first_phases(crow, banks)[row] + phase)


def place_blocks(hidden: int, element_bytes: int, block: int = 32) -> Tensor:
    """An order (H,) of the hidden units with each ``block`` of them in one bank.

    Rows that were pruned to equally many nonzeros in every 32 columns then have equally many in
    every bank. As they are where the banks cannot have equally many blocks.
    """
    banks = num_banks(element_bytes)
    units = torch.arange(hidden)
    if hidden % (block * banks):
        return units
    return units.view(-1, banks, block).transpose(0, 1).reshape(banks, -1).T.reshape(-1)


def fullest(crow: Tensor, col: Tensor, element_bytes: int) -> Tensor:
    """How many nonzeros each row (R,) has in the bank where it has most: the fewest waves it takes.

    See ``waves`` for the arguments.
    """
    banks, rows = num_banks(element_bytes), crow.shape[0] - 1
    count = torch.bincount(_rows(crow) * banks + col.long() % banks, minlength=rows * banks)
    return count.view(rows, banks).amax(1)


def permute_units(
    crow: Tensor, col: Tensor, hidden: int, element_bytes: int, num_passes: int = 8
) -> Tensor:
    """An order (H,) of the hidden units that spreads each row's columns evenly over the banks.

    Unit ``order[i]`` is to lie at i. Two units of one bank cost as many conflicts as rows have
    both; units of different banks change places while that makes the sum less (Kernighan and Lin,
    Bell System Technical Journal 49, 1970).
    """
    banks = num_banks(element_bytes)
    mask = torch.zeros((crow.shape[0] - 1, hidden), dtype=torch.float32)
    mask[_rows(crow), col.long()] = 1
    together = mask.T @ mask
    bank_of = torch.arange(hidden) % banks
    for _ in range(num_passes):
        if not sum(_swap(together, bank_of, a, b) for a in range(banks) for b in range(a)):
            break
    # Units of a bank stay in order; position i lies in bank i % banks.
    order = torch.empty(hidden, dtype=torch.int64)
    for bank in range(banks):
        order[bank::banks] = (bank_of == bank).nonzero()[:, 0]
    return order


def deal(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Share items out, the longest first and always to whom has least; item numbers of each part.

    Graham's rule: no part has more than 4/3 of what is best.
    """
    heap = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, part = heapq.heappop(heap)
        parts[part].append(item)
        heapq.heappush(heap, (load + costs[item], part))
    return parts


def _place_surplus(
    row: Tensor, phase: Tensor, surplus: Tensor, rank: Tensor, phases: Tensor, banks: int
) -> Tensor:
    """Phases of what full banks have too much: lanes that are free, from the first phase on."""
    num_rows, most = phases.shape[0], int(phases.max()) if phases.numel() else 0
    base = row[~surplus] * most + phase[~surplus]
    taken = torch.bincount(base, minlength=num_rows * most).view(num_rows, most)
    there = torch.arange(most, device=row.device) < phases.unsqueeze(1)
    free = torch.where(there, banks - taken, 0)
    # A row's surplus in turns over its banks, so that a phase seldom gets two of one bank.
    rows = row[surplus]
    turn = (rows * (int(rank.max()) + 1 if rank.numel() else 1) + rank[surplus]).argsort(
        stable=True
    )
    number = torch.empty_like(rows)
    number[turn] = _rank(rows[turn])
    return torch.searchsorted(free.cumsum(1)[rows], number.unsqueeze(1), right=True)[:, 0]


def _swap(together: Tensor, bank_of: Tensor, a: int, b: int) -> int:
    """Change units of two banks while it helps; how many changed."""
    first, second = (bank_of == a).nonzero()[:, 0], (bank_of == b).nonzero()[:, 0]
    inner_a = together[first][:, first].sum(1) - together[first, first]
    inner_b = together[second][:, second].sum(1) - together[second, second]
    between = together[first][:, second]
    gain_a = inner_a - between.sum(1)
    gain_b = inner_b - between.sum(0)
    gain = gain_a.unsqueeze(1) + gain_b + 2 * between
    best, at = gain.max(1)
    i = int(best.argmax()) if best.numel() else 0
    if not best.numel() or float(best[i]) <= 0:
        return 0
    bank_of[first[i]], bank_of[second[at[i]]] = b, a
    return 1


def _rows(crow: Tensor) -> Tensor:
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff().long())


def _first_phases(crow: Tensor, banks: int) -> Tensor:
    """The number (R + 1,) of phases before each row."""
    phases = num_slots(crow) * (LANES // banks)
    return torch.cat([phases.new_zeros(1), phases.cumsum(0)])


def _rank(group: Tensor) -> Tensor:
    """How many before each item are of its group."""
    order = group.argsort(stable=True)
    arranged = group[order]
    starts = torch.ones_like(arranged, dtype=torch.bool)
    starts[1:] = arranged[1:] != arranged[:-1]
    numbers = torch.arange(group.shape[0], device=group.device)
    first = torch.where(starts, numbers, 0).cummax(0).values
    rank = torch.empty_like(numbers)
    rank[order] = numbers - first
    return rank
