"""What the persistent kernel keeps on a multiprocessor: registers, shared memory, and if it fits.

The numbers are those of ops/recurrence/cuda.cu, which is compiled for each ``Kernel``.

Legend: H hidden units, G gates, B sequences, W sequences side by side.
"""

from dataclasses import dataclass

from fivefold.sparse_rnn.arrangement import Arrangement
from fivefold.sparse_rnn.layout import LANES
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS

# Words of nonzeros that a thread has room for beside all else, of 255 registers.
MAX_REGISTER_WORDS = 192

# Of values, by which the kernel knows them.
KINDS = {"float16": 0, "bfloat16": 1, "float32": 2}

# From so many words on, few loads are under way at once; kInFlight of cuda.cu.
_FEW_LOADS_FROM = 160

_WORD = 4
_NARROW_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What the persistent kernel is compiled for.

    Attributes:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        backward: whether it computes gradients, with the transposed matrix.
        barrier: whether blocks wait at a barrier of the grid instead of for each word.
        hidden: H.
        width: sequences side by side, 1, 2 or 4.
        kind: dtype of the packed values.
        source: dtype that values are packed from.
        most_units: of a block.
        num_warps: of a block.
        shape: slots of each run of a warp.
    """

    cell: str
    backward: bool
    barrier: bool
    hidden: int
    width: int
    kind: str
    source: str
    most_units: int
    num_warps: int
    shape: tuple[int, ...]

    @property
    def num_gates(self) -> int:
        """G."""
        return CELLS[self.cell].num_gates

    @property
    def element_bytes(self) -> int:
        """Of one column of the vector."""
        return self.width * _WORD

    @property
    def wide(self) -> bool:
        """Whether a nonzero takes two words, see pack.py."""
        last = (self.hidden - 1) * self.element_bytes
        return self.kind == "float32" or last >= _NARROW_BYTES

    @property
    def pairs(self) -> int:
        """Nonzeros of a thread, padding included."""
        return sum(self.shape)

    @property
    def register_pairs(self) -> int:
        """Those of them that registers hold."""
        return min(self.pairs, MAX_REGISTER_WORDS // (1 + self.wide))

    @property
    def registers(self) -> int:
        """Of a thread, about; what the compiler takes beside the words was read off its code."""
        words = self.register_pairs * (1 + self.wide)
        wide = 8 * self.wide
        if words > _FEW_LOADS_FROM:
            return min(words + 63 + wide, 255)
        # Loads of 16 bytes under way take most.
        others = 80 + min(self.register_pairs, 16) if self.width == 4 else 74
        return min(words + others, 243 + wide)

    @property
    def num_threads(self) -> int:
        """Of a block."""
        return LANES * self.num_warps

    @property
    def columns(self) -> int:
        """Of the vector that a step multiplies: states, backwards gradients of all gates."""
        return self.hidden * (self.num_gates if self.backward else 1)

    @property
    def vector_words(self) -> int:
        """Of a slot, in whole 16 bytes."""
        return -(-self.columns * self.width // 4) * 4

    @property
    def num_inputs(self) -> int:
        """Numbers that a step reads of each unit and sequence."""
        saved = CELLS[self.cell].num_saved
        return (saved + 2 if saved else 2) if self.backward else self.num_gates

    def num_groups(self, batch: int) -> int:
        """How often a step goes over the nonzeros."""
        return -(-batch // self.width)

    def shared_bytes(self, batch: int) -> int:
        """Shared memory of a block for B sequences, as the kernel divides it up."""
        places, units = len(self.shape) * self.num_warps, self.most_units
        words = self.vector_words + places * self.width
        words += 2 * units * self.width * self.num_inputs
        words += units * (3 + self.num_gates) + places + 1
        words = -(-words // 4) * 4
        words += (self.pairs - self.register_pairs) * (1 + self.wide) * self.num_threads
        # The states h and c, and the lengths.
        return (words + 2 * units * batch + batch) * _WORD

    def defines(self) -> dict[str, int | str]:
        """Macros of cuda.cu."""
        firsts = [sum(self.shape[:i]) for i in range(len(self.shape))]
        runs = [f"RUN({i}, {firsts[i]}, {count})" for i, count in enumerate(self.shape)]
        return {
            "CELL": CELLS[self.cell].number,
            "BACKWARD": int(self.backward),
            "BARRIER": int(self.barrier),
            "WIDE": int(self.wide),
            "KIND": KINDS[self.kind],
            "SOURCE": KINDS[self.source],
            "WIDTH": self.width,
            "HIDDEN": self.hidden,
            "UNITS": self.most_units,
            "WARPS": self.num_warps,
            "POSITIONS": len(self.shape),
            "PAIRS": self.pairs,
            "REGISTER_PAIRS": self.register_pairs,
            "RUNS": " ".join(runs),
        }


def fit(
    arrangement: Arrangement,
    *,
    cell: str,
    backward: bool,
    hidden: int,
    batch: int,
    kind: str,
    source: str,
    shared_bytes: int,
    barrier: bool = False,
    width: int | None = None,
) -> tuple[Kernel, str | None]:
    """The kernel for rows arranged so that takes most sequences at once of those that have room.

    Args:
        arrangement: of the rows.
        cell: see ``Kernel``.
        backward: see ``Kernel``.
        hidden: H.
        batch: B.
        kind: see ``Kernel``.
        source: see ``Kernel``.
        shared_bytes: that a block may have.
        barrier: see ``Kernel``.
        width: the only one to try.

    Returns:
        The kernel, and why it has no room where none has.
    """
    refusal = None
    for each in widths(batch) if width is None else (width,):
        kernel = Kernel(
            cell=cell,
            backward=backward,
            barrier=barrier,
            hidden=hidden,
            width=each,
            kind=kind,
            source=source,
            most_units=arrangement.most_units,
            num_warps=arrangement.num_warps,
            shape=arrangement.shape,
        )
        refusal = misfit(kernel, batch, shared_bytes)
        if refusal is None:
            break
    return kernel, refusal


def widths(batch: int) -> tuple[int, ...]:
    """How many sequences may lie side by side, best first: one access brings all of them."""
    return tuple(width for width in (4, 2, 1) if width < 2 * batch)


def misfit(kernel: Kernel, batch: int, shared_bytes: int) -> str | None:
    """Why a kernel has no room on a device; None where it has.

    Args:
        kernel: the kernel.
        batch: B.
        shared_bytes: that a block may have.
    """
    needed = kernel.shared_bytes(batch)
    if needed <= shared_bytes:
        return None
    over = kernel.pairs - kernel.register_pairs
    words = over * (1 + kernel.wide) * kernel.num_threads * _WORD
    return (
        f"a block needs {needed} bytes of shared memory where the device has {shared_bytes}: "
        f"{kernel.vector_words * _WORD} for {kernel.columns} numbers of {kernel.width} sequences "
        f"and {words} for the {over} of {kernel.pairs} nonzeros of a thread that are too many for "
        f"registers, which hold {kernel.register_pairs} of "
        f"{'8' if kernel.wide else '4'} bytes"
    )
