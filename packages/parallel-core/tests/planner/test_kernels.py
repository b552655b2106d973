"""Products in whole waves of tiles, or as fast as memory allows; messages over their links."""

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.kernels import (
    TILES,
    Gemm,
    backward_seconds,
    gemm_seconds,
    traffic_seconds,
)

TILE = TILES[0]
MACHINE = replace(hardware("a100"), half_size=0.0, efficiency=1.0, bandwidth_efficiency=1.0)


def test_full_waves_run_at_the_peak() -> None:
    gemm = Gemm(TILE[0] * 12, TILE[1] * 9 * 3, 8192)  # 324 tiles over 108 multiprocessors
    exact = 2 * gemm.m * gemm.n * gemm.k / MACHINE.flops
    assert gemm_seconds(MACHINE, gemm, 2) == pytest.approx(exact)
    # One row more is one row of tiles more, and they are dealt out in a wave more.
    assert gemm_seconds(MACHINE, gemm._replace(m=gemm.m + 1), 2) == pytest.approx(exact * 4 / 3)


def test_a_short_sum_is_as_fast_as_memory() -> None:
    size = 2 * (2 * 8192 * 16 + 8192 * 8192)
    assert gemm_seconds(MACHINE, Gemm(8192, 8192, 16), 2) == pytest.approx(size / MACHINE.bandwidth)
    assert traffic_seconds(MACHINE, size) == pytest.approx(size / MACHINE.bandwidth)


def test_small_tiles_are_for_small_products() -> None:
    """One large tile would leave 107 multiprocessors idle; eight small ones leave 100."""
    found = gemm_seconds(MACHINE, Gemm(*TILE, 65536), 2)
    share = 64 * 64 / 128 / (128 * 256 / 384)
    assert found == pytest.approx(2 * 64 * 64 * 65536 * 108 / MACHINE.flops / share)


def test_several_products_share_a_wave() -> None:
    wave = 2 * TILE[0] * TILE[1] * 4096 * 108 / MACHINE.flops
    fast = replace(MACHINE, bandwidth=1e15)
    assert gemm_seconds(fast, Gemm(*TILE, 4096, 108), 2) == pytest.approx(wave)
    assert gemm_seconds(fast, Gemm(*TILE, 4096, 216), 2) == pytest.approx(2 * wave)


def test_backward_is_two_products() -> None:
    gemm = Gemm(4096, 2048, 1024)
    rows, weight = backward_seconds(MACHINE, gemm, 2)
    assert rows == gemm_seconds(MACHINE, Gemm(4096, 1024, 2048), 2)
    assert weight == gemm_seconds(MACHINE, Gemm(1024, 2048, 4096), 2)


def test_nothing_takes_no_time() -> None:
    assert gemm_seconds(MACHINE, Gemm(0, 8, 8), 2) == 0
