"""Does a sparse layer fit on a GPU's multiprocessors, how is it laid out, how long is a step.

Times are arithmetic, not measurements. A step's floor is the longest of three: reading a state for
each nonzero out of shared memory, reading all states into every multiprocessor, and a word's way
from one to another. What is predicted is their sum, with the busiest warp and with bank conflicts.

Legend: R = G*H rows, H hidden units, G gates, B sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.sparse_rnn import layout, pattern
from fivefold.sparse_rnn.arrangement import arrange, num_blocks
from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS
from fivefold.sparse_rnn.ops.recurrence.tables import Matrix
from fivefold.sparse_rnn.resident import KINDS, Kernel, fit

# Of shared memory: bytes that a multiprocessor reads in a clock.
_WAVE_BYTES = 128

# Rows that conflicts are simulated with, drawn at random or from those given.
_SAMPLED_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        name: of the GPU.
        num_sms: streaming multiprocessors.
        shared_bytes: that a block may have.
        clock: Hz.
        l2_bandwidth: bytes/s from the second-level cache, about.
        exchange_seconds: from publishing a word to having it in another multiprocessor, about: two
            ways through the second-level cache.
    """

    name: str
    num_sms: int
    shared_bytes: int
    clock: float
    l2_bandwidth: float
    exchange_seconds: float = 0.75e-6

    @classmethod
    def here(cls, index: int = 0) -> "Device":
        """A GPU of this machine; what its driver does not tell is as of the H100.

        Raises:
            SparseRNNInputError: there is none.
        """
        if not torch.cuda.is_available():
            raise SparseRNNInputError(f"there is no GPU here; name one of {', '.join(DEVICES)}")
        found: Any = torch.cuda.get_device_properties(index)
        return cls(
            name=found.name,
            num_sms=found.multi_processor_count,
            shared_bytes=found.shared_memory_per_block_optin,
            clock=getattr(found, "clock_rate", DEVICES["h100"].clock / 1e3) * 1e3,
            l2_bandwidth=DEVICES["h100"].l2_bandwidth,
        )


DEVICES = {
    "a100": Device(
        name="A100", num_sms=108, shared_bytes=166912, clock=1.41e9, l2_bandwidth=4.5e12
    ),
    "h100": Device(
        name="H100", num_sms=132, shared_bytes=232448, clock=1.755e9, l2_bandwidth=5.5e12
    ),
    "h200": Device(
        name="H200", num_sms=132, shared_bytes=232448, clock=1.755e9, l2_bandwidth=5.5e12
    ),
    "b200": Device(
        name="B200", num_sms=148, shared_bytes=232448, clock=1.85e9, l2_bandwidth=5.5e12
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a layer runs on a device.

    Attributes:
        device: the GPU.
        kernel: what the persistent kernel is compiled for.
        batch: B.
        num_nonzeros: of the matrix.
        num_blocks: of the grid, one a multiprocessor.
        refusal: why the persistent kernel has no room; None where it has.
        shared_bytes: of a block.
        padding: slots of nonzeros that the busiest warp stands for, over the nonzeros.
        conflicts: waves of shared memory over the fewest that could be.
        gather_seconds: of a step, states read out of shared memory, with padding and conflicts.
        broadcast_seconds: of a step, states read into every multiprocessor.
        floor_seconds: of a step, the longest of the least times.
        step_seconds: predicted.
    """

    device: Device
    kernel: Kernel
    batch: int
    num_nonzeros: int
    num_blocks: int
    refusal: str | None
    shared_bytes: int
    padding: float
    conflicts: float
    gather_seconds: float
    broadcast_seconds: float
    floor_seconds: float
    step_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the persistent kernel has room."""
        return self.refusal is None

    @property
    def path(self) -> str:
        """What runs: where nonzeros stay, or a launch for each step."""
        if not self.fits:
            return "triton, a launch for each step"
        shared = self.kernel.pairs > self.kernel.register_pairs
        return "cuda, nonzeros in registers" + " and shared memory" * shared

    def __str__(self) -> str:
        kernel, device = self.kernel, self.device
        density = self.num_nonzeros / max(kernel.num_gates * kernel.hidden**2, 1)
        over = kernel.pairs - kernel.register_pairs
        lines = [
            f"{kernel.cell} of {kernel.hidden} units, {self.num_nonzeros} nonzeros "
            f"({density:.1%}), {self.batch} sequences, "
            f"{'backward' if kernel.backward else 'forward'}, {device.name}",
            f"path           {self.path}",
        ]
        if self.refusal is not None:
            return "\n".join([*lines, f"no room        {self.refusal}"])
        each = f"{8 if kernel.wide else 4} bytes ({kernel.kind})"
        lines += [
            f"blocks         {self.num_blocks} on {device.num_sms} multiprocessors, "
            f"up to {kernel.most_units} units",
            f"nonzeros       {kernel.register_pairs} a thread in registers, {over} in shared "
            f"memory, {each}",
            f"registers      {kernel.registers} of 255",
            f"shared memory  {self.shared_bytes} of {device.shared_bytes} bytes",
            f"sequences      {kernel.width} at once, {kernel.num_groups(self.batch)} times a step",
            f"padding        {self.padding:.3f}",
            f"conflicts      {self.conflicts:.3f} waves over the fewest",
            f"step           {self.step_seconds * 1e6:.2f} us predicted: "
            f"{self.gather_seconds * 1e6:.2f} shared memory, "
            f"{self.broadcast_seconds * 1e6:.2f} broadcast, "
            f"{_exchange(device, self.num_blocks) * 1e6:.2f} exchange",
            f"floor          {self.floor_seconds * 1e6:.2f} us",
        ]
        return "\n".join(lines)


def plan(
    cell: str,
    hidden_size: int,
    *,
    density: float | None = None,
    nonzeros: tuple[Tensor, Tensor] | None = None,
    batch: int = 1,
    values: str = "float32",
    device: str | Device = "h100",
    backward: bool = False,
) -> Plan:
    """How a layer's recurrent matrix runs on a GPU, which need not be here.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        hidden_size: H.
        density: share of nonzeros, at random; or give ``nonzeros``.
        nonzeros: where rows begin (R + 1,) and the columns (N,), as ``pattern_of`` of a layer.
        batch: B.
        values: dtype that they are packed in, "float16", "bfloat16" or "float32".
        device: a name of ``DEVICES``, or a ``Device``.
        backward: the kernel of the gradients.

    Raises:
        SparseRNNInputError: what is not known or cannot be, with what is legal.
    """
    target = _check(cell, hidden_size, density, nonzeros, batch, values, device)
    gates = CELLS[cell].num_gates
    if nonzeros is not None:
        matrix = Matrix.of(*nonzeros, hidden_size, turned=backward)
        counts = matrix.crow.diff()
        sample = _first_rows(matrix)
    elif density is not None:
        counts = _drawn_counts(gates * hidden_size, hidden_size, density)
        sample = pattern.from_mask(pattern.random_mask(_SAMPLED_ROWS, hidden_size, density))
    slots = (-(-counts // layout.LANES)).tolist()
    blocks = num_blocks(sum(slots), hidden_size, target.num_sms)
    arrangement = arrange(slots, hidden_size, blocks)
    kernel, refusal = fit(
        arrangement,
        cell=cell,
        backward=backward,
        hidden=hidden_size,
        batch=batch,
        kind=values,
        source=values,
        shared_bytes=target.shared_bytes,
    )
    return _timed(target, kernel, refusal, batch, int(counts.sum()), blocks, sample)


def _timed(
    device: Device,
    kernel: Kernel,
    refusal: str | None,
    batch: int,
    num_nonzeros: int,
    blocks: int,
    sample: tuple[Tensor, Tensor],
) -> Plan:
    size, groups = kernel.element_bytes, kernel.num_groups(batch)
    crow, col = sample
    places = layout.reorder(crow, col, size)
    conflicts = layout.ratio(crow, col, places, size)
    banks = layout.num_banks(size)
    # Waves of an access of a whole warp, as it is; the lanes of a phase without nonzeros take one.
    accesses = int(layout.num_slots(crow).sum())
    waves = float(layout.waves(crow, col, places, size).clamp(min=1).sum()) / max(accesses, 1)
    over = kernel.pairs - kernel.register_pairs
    clocks = kernel.num_warps * (kernel.pairs * waves + over * (1 + kernel.wide))
    gather = groups * clocks / device.clock
    sent = blocks * groups * kernel.vector_words * 4
    broadcast, exchange = sent / device.l2_bandwidth, _exchange(device, blocks)
    least = groups * num_nonzeros / banks / device.num_sms / device.clock
    lanes = blocks * kernel.pairs * kernel.num_threads
    return Plan(
        device=device,
        kernel=kernel,
        batch=batch,
        num_nonzeros=num_nonzeros,
        num_blocks=blocks,
        refusal=refusal,
        shared_bytes=kernel.shared_bytes(batch),
        padding=lanes / max(num_nonzeros, 1),
        conflicts=conflicts,
        gather_seconds=gather,
        broadcast_seconds=broadcast,
        floor_seconds=max(least, broadcast, exchange),
        step_seconds=gather + broadcast + exchange,
    )


def _exchange(device: Device, blocks: int) -> float:
    """A block alone has nobody to wait for, but its own words come back from the cache too."""
    return device.exchange_seconds if blocks > 1 else device.exchange_seconds / 2


def _drawn_counts(rows: int, hidden: int, density: float) -> Tensor:
    """Nonzeros (R,) of rows whose values were kept at random."""
    generator = torch.Generator().manual_seed(0)
    spread = (hidden * density * (1 - density)) ** 0.5
    drawn = hidden * density + spread * torch.randn(rows, generator=generator)
    return drawn.round().clamp(0, hidden).long()


def _first_rows(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Some rows, evenly from all, as a matrix of their own."""
    rows = matrix.crow.shape[0] - 1
    step = max(1, rows // _SAMPLED_ROWS)
    chosen = torch.arange(0, rows, step, device=matrix.col.device)
    counts = matrix.crow.diff()[chosen]
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    within = torch.arange(int(crow[-1]), device=counts.device) - crow[:-1].repeat_interleave(counts)
    return crow, matrix.col[matrix.crow[:-1][chosen].repeat_interleave(counts) + within]


def _check(
    cell: str,
    hidden: int,
    density: float | None,
    nonzeros: tuple[Tensor, Tensor] | None,
    batch: int,
    values: str,
    device: str | Device,
) -> Device:
    """The device; an error unless all can be."""
    if cell not in CELLS:
        raise SparseRNNInputError(f"cells are {', '.join(CELLS)}, found {cell!r}")
    if values not in KINDS:
        raise SparseRNNInputError(f"values are {', '.join(KINDS)}, found {values!r}")
    for name, size in (("hidden_size", hidden), ("batch", batch)):
        if size < 1:
            raise SparseRNNInputError(f"{name} is {size}; it must be at least 1")
    if (density is None) == (nonzeros is None):
        raise SparseRNNInputError("give a density or the nonzeros, one of the two")
    if density is not None:
        pattern.check_density(density)
    rows = CELLS[cell].num_gates * hidden
    if nonzeros is not None and nonzeros[0].shape[0] != rows + 1:
        raise SparseRNNInputError(
            f"{cell} of {hidden} units has {rows} rows, so {rows + 1} numbers of where they begin "
            f"and end, found {nonzeros[0].shape[0]}"
        )
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise SparseRNNInputError(f"devices are {', '.join(DEVICES)}, found {device!r}")
    return DEVICES[device]
