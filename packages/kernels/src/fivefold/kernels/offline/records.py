"""What is known of a kernel's machine code for one architecture, in a table and in a file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fivefold.kernels import files
from fivefold.kernels.errors import KernelInputError

# Of a sample in the table; files have it whole.
_LONGEST_NAME = 36

Key = tuple[str, str, str, str, str, str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One kernel and target.

    Attributes:
        package: of the op.
        op: its name.
        kernel: its name.
        target: the architecture, such as ``sm_90a``.
        sample: the call that starts it.
        dtype: of the call's floating-point tensors.
        variant: tells kernels of the same name in one call apart, by order.
        num_warps: warps of 32 threads in a block.
        num_stages: depth of the software pipeline; 0 for CUDA C++.
        registers: of a thread.
        spill_bytes: that a thread moves between registers and local memory.
        shared_bytes: of a block.
        tensor_core: how many instructions of each kind that tensor cores execute.
        load_bytes: the widest load of a thread from global memory.
        store_bytes: the widest store of a thread to it.
        narrow_loads: share of the bytes loaded that narrower loads than 16 bytes move, counted by
            instructions: scalars weigh much in a small kernel.
        narrow_stores: the same of stores.
        lost_load_bytes: that a thread loads of tiles with 16 bytes or more for each thread, but by
            narrower loads.
        lost_store_bytes: the same of stores.
        moved_bytes: of the tensors that the kernel takes.
        has_dot: whether it multiplies matrices.
        needs_tensor_cores: whether that must be on tensor cores: operands of at most 16 bits in an
            op that is meant to.
        needs_wide: whether it must load or store 16 bytes at once: it multiplies no matrices, and
            what it reads is not single values that indices point at.
        compiler: name and version.
    """

    package: str
    op: str
    kernel: str
    target: str
    sample: str
    dtype: str
    variant: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]
    load_bytes: int
    store_bytes: int
    narrow_loads: float
    narrow_stores: float
    lost_load_bytes: int
    lost_store_bytes: int
    moved_bytes: int
    has_dot: bool
    needs_tensor_cores: bool
    needs_wide: bool
    compiler: str

    @property
    def key(self) -> Key:
        """What it is a record of."""
        return (
            self.package,
            self.op,
            self.kernel,
            self.sample,
            self.dtype,
            self.target,
            self.variant,
        )

    @property
    def title(self) -> str:
        """The same for people."""
        number = f" #{self.variant + 1}" if self.variant else ""
        name = f"{self.package}/{self.op} {self.kernel}{number}"
        return f"{name} ({self.sample}, {self.dtype}, {self.target})"


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records in one step and in a fixed order, so that files can be compared."""
    ordered = [asdict(record) for record in sorted(records, key=lambda record: record.key)]
    lines = ",\n".join(f"  {json.dumps(record)}" for record in ordered)
    files.replace(path, f"[\n{lines}\n]\n" if lines else "[]\n")


def read(path: Path) -> list[Record]:
    """Records of a file.

    Raises:
        KernelInputError: it holds something else.
    """
    try:
        return [Record(**each) for each in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise KernelInputError(f"{path} is no table of kernels: {error}") from error


def table(records: Sequence[Record]) -> str:
    """Records as aligned columns."""
    head = ("op", "kernel", "sample", "dtype", "target", "warps", "registers", "spill", "shared")
    rows: list[tuple[str, ...]] = [(*head, "tensor cores", "load", "store")]
    rows += [_row(record) for record in sorted(records, key=lambda record: record.key)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(record: Record) -> tuple[str, ...]:
    cores = " ".join(f"{name}×{count}" for name, count in record.tensor_core.items())
    return (
        f"{record.package}/{record.op}",
        record.kernel + (f" #{record.variant + 1}" if record.variant else ""),
        _cut(record.sample),
        record.dtype,
        record.target,
        str(record.num_warps),
        str(record.registers),
        str(record.spill_bytes),
        str(record.shared_bytes),
        cores or "-",
        _access(record.load_bytes, record.lost_load_bytes),
        _access(record.store_bytes, record.lost_store_bytes),
    )


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _access(widest: int, lost: int) -> str:
    if not widest:
        return "-"
    return f"{widest} ({lost} lost)" if lost else str(widest)
