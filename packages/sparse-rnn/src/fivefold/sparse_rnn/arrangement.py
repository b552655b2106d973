"""Who multiplies what on a GPU: hidden units dealt to blocks, their rows to warps.

A row's nonzeros are taken 32 at a time, a slot, by the lanes of a warp. What a kernel keeps in
registers it has to address by numbers known when it is compiled, so all warps of all blocks have
the same *shape*: so many slots in a first run, so many in a second, and so on. A run is a row or,
where a block's rows do not divide evenly among its warps, a part of one.

Legend: R = G*H rows of H units with G gates, numbered gate by gate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fivefold.sparse_rnn.layout import deal

NUM_WARPS = 8

# What a run costs beside its slots, in slots: the sum over lanes.
_RUN_COST = 1.5

# With less to do, a warp would wait longer for others than it works; with more units than that, a
# block would compute gates longer.
_SLOTS_OF_WARP, _UNITS_OF_BLOCK = 12, 64


class Run(NamedTuple):
    """Some slots of a row: from ``first`` on, ``num_slots`` of them, at ``place`` in a block."""

    block: int
    place: int
    row: int
    first: int
    num_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """A matrix's rows on the warps of a GPU.

    Attributes:
        units: the hidden units of each block.
        runs: all runs that hold something; ``place`` is warp + number of warps * number of the run.
        shape: slots of each run.
        sums: of each row, where the sums of its runs are: the first place and how many.
        num_warps: of a block.
    """

    units: list[list[int]]
    runs: list[Run]
    shape: tuple[int, ...]
    sums: list[tuple[int, int]]
    num_warps: int

    @property
    def num_slots(self) -> int:
        """Slots of a warp: pairs that each of its lanes holds."""
        return sum(self.shape)

    @property
    def most_units(self) -> int:
        """Units of the block that has most."""
        return max(map(len, self.units))


def num_blocks(num_slots: int, num_units: int, num_sms: int, num_warps: int = NUM_WARPS) -> int:
    """Blocks for a matrix, one a multiprocessor at most.

    No more than have enough to do, and no more than shorten the work of the busiest: 2304 units are
    18 in each of 128 blocks, and with 132 blocks 18 would also be the most.

    Args:
        num_slots: of all rows together.
        num_units: H.
        num_sms: multiprocessors.
        num_warps: of a block.
    """
    wanted = max(num_slots // (_SLOTS_OF_WARP * num_warps), num_units // _UNITS_OF_BLOCK, 1)
    blocks = min(num_sms, num_units, wanted)
    most = -(-num_units // blocks)
    return -(-num_units // most)


def arrange(
    slots: Sequence[int], num_units: int, blocks: int, num_warps: int = NUM_WARPS
) -> Arrangement:
    """Share rows out so that all warps have nearly the same to do.

    Args:
        slots: of each row (R,).
        num_units: H.
        blocks: that share the units.
        num_warps: of a block.
    """
    num_gates = len(slots) // num_units
    costs = [sum(slots[g * num_units + u] for g in range(num_gates)) + 1 for u in range(num_units)]
    units = [sorted(part) for part in deal(costs, blocks)]
    rows = [
        sorted((g * num_units + u for u in part for g in range(num_gates)), key=lambda r: -slots[r])
        for part in units
    ]
    whole, parts = _split([[slots[r] for r in of_block] for of_block in rows], num_warps)
    found = [
        run
        for block, of_block in enumerate(rows)
        for run in _runs(block, of_block, slots, whole, parts, num_warps)
    ]
    shape = _shape([(run.place, run.num_slots) for run in found], num_warps)
    sums = [(0, 0)] * len(slots)
    for run in found:
        first, count = sums[run.row]
        sums[run.row] = (first if count else run.place, count + 1)
    return Arrangement(units=units, runs=found, shape=shape, sums=sums, num_warps=num_warps)


def _split(slots: list[list[int]], num_warps: int) -> tuple[int, int]:
    """How many runs of each warp are whole rows, and in how many parts the other rows are cut."""
    most = max(map(len, slots))
    best = (float("inf"), 0, 1)
    for whole in range(max(0, most // num_warps - 1), -(-most // num_warps) + 1):
        for parts in range(1, num_warps + 1):
            shape = _shape(
                [piece for each in slots for piece in _pieces(each, whole, parts, num_warps)],
                num_warps,
            )
            cost = sum(shape) + _RUN_COST * len(shape)
            best = min(best, (cost, whole, parts))
    return best[1], best[2]


def _pieces(slots: list[int], whole: int, parts: int, num_warps: int) -> list[tuple[int, int]]:
    """Places and slots of what a block's rows, longest first, are cut into."""
    num_cut = max(0, len(slots) - whole * num_warps)
    behind = whole * num_warps
    cut = [
        (behind + i * parts + part, (count + parts - 1 - part) // parts)
        for i, count in enumerate(slots[:num_cut])
        for part in range(parts)
    ]
    return [*enumerate(slots[num_cut:]), *cut]


def _shape(pieces: list[tuple[int, int]], num_warps: int) -> tuple[int, ...]:
    """The most slots of each run."""
    shape: dict[int, int] = {}
    for place, count in pieces:
        shape[place // num_warps] = max(shape.get(place // num_warps, 0), count)
    counts = [shape.get(i, 0) for i in range(max(shape, default=-1) + 1)]
    # Rows without nonzeros come last of the whole ones; a run of nothing keeps its number.
    while counts and counts[-1] == 0:
        counts.pop()
    return tuple(counts)


def _runs(
    block: int, rows: list[int], slots: Sequence[int], whole: int, parts: int, num_warps: int
) -> Iterator[Run]:
    """The runs of a block's rows, longest first, as ``_pieces`` cuts them."""
    num_cut = max(0, len(rows) - whole * num_warps)
    owners = [*rows[num_cut:], *(row for row in rows[:num_cut] for _ in range(parts))]
    done = dict.fromkeys(rows, 0)
    pieces = _pieces([slots[row] for row in rows], whole, parts, num_warps)
    for (place, count), row in zip(pieces, owners, strict=True):
        if count:
            yield Run(block, place, row, done[row], count)
            done[row] += count
