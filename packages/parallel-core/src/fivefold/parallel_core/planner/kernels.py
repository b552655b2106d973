"""Seconds of one forward or backward kernel: the larger of its arithmetic and its memory traffic.

A roofline (Williams et al., 2009) whose arithmetic is done in whole tiles by whole waves of
multiprocessors. Legend: a product of (m, k) by (k, n).
"""

from math import ceil
from typing import NamedTuple

from fivefold.parallel_core.planner.hardware import Hardware


class Gemm(NamedTuple):
    """``number`` products of (m, k) by (k, n)."""

    m: float
    n: float
    k: float
    number: float = 1.0


TILES = ((128, 256), (128, 128), (64, 128), (64, 64))
"""Rows and columns of the result that one multiprocessor makes at a time."""


def _share(rows: int, columns: int) -> float:
    """Of the speed of the largest tile, which reads the fewest bytes for each multiplication."""
    most = TILES[0]
    return rows * columns / (rows + columns) * (most[0] + most[1]) / (most[0] * most[1])


def gemm_seconds(machine: Hardware, gemm: Gemm, element_size: int) -> float:
    """Of all ``number``, which share the multiprocessors.

    Tiles are dealt out in waves; the last one, and the tiles at the edges, are only partly full.
    Of the sizes of tiles the fastest is taken.
    """
    m, n, k, number = gemm
    if not m * n * k * number:
        return 0.0
    arithmetic = min(_waves(machine, gemm, *tile) for tile in TILES)
    moved = number * element_size * (m * k + k * n + m * n)
    return max(arithmetic, traffic_seconds(machine, moved))


def _waves(machine: Hardware, gemm: Gemm, rows: int, columns: int) -> float:
    m, n = sorted(gemm[:2])
    waves = ceil(gemm.number * ceil(m / rows) * ceil(n / columns) / machine.num_cores)
    each = 2 * rows * columns * (gemm.k + machine.half_size) * machine.num_cores
    return waves * each / (machine.flops * machine.efficiency * _share(rows, columns))


def backward_seconds(machine: Hardware, gemm: Gemm, element_size: int) -> tuple[float, float]:
    """Of the products for the gradient of the rows, and for that of the weight."""
    m, n, k, number = gemm
    rows = gemm_seconds(machine, Gemm(m, k, n, number), element_size)
    return rows, gemm_seconds(machine, Gemm(k, n, m, number), element_size)


def traffic_seconds(machine: Hardware, size: float) -> float:
    """Of reading or writing so many bytes of the device's memory."""
    return size / (machine.bandwidth * machine.bandwidth_efficiency)
