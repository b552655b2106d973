"""Measuring the machine at hand: the constants of ``Hardware`` from runs of a few seconds.

Each constant is what its formula makes of the times, so that a plan for this machine uses the same
definitions: products of matrices give peak and ``half_size`` (``kernels.gemm_seconds``), a copy the
memory's bandwidth, fused attention its share of the peak, and collectives over forked ranks (or
those of the accelerators of this machine) latency and bandwidth of the link (``links.seconds``).
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.files import atomic_write_text
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.planner.hardware import Hardware

WIDTH = 1024
"""Rows and columns of the products that are timed."""
SUMS = (64, 256, 1024, 2048)
"""Lengths of their sums."""
_ATTENTION = (8, 1024, 64)
_MESSAGES = (1 << 10, 1 << 22)


def calibrate(name: str, num_ranks: int = 2, repeats: int = 5) -> Hardware:
    """Measure this machine.

    Args:
        name: of the result.
        num_ranks: among which collectives are timed; 1 takes the memory's bandwidth for the link.
        repeats: of every timing, of which the fastest counts.

    Raises:
        ConfigError: fewer than one rank or repeat.
    """
    if num_ranks < 1 or repeats < 1:
        raise ConfigError(f"num_ranks={num_ranks}, repeats={repeats}; both must be at least 1")
    device = _device()
    dtype = torch.bfloat16
    with torch.no_grad():
        peak, half = fit_line([(k, _product(k, device, dtype, repeats)) for k in SUMS])
        copied = _copy(device, repeats)
        attention = min(1.0, _attention(device, dtype, repeats) / peak)
    latency, link = 1e-6, copied
    if num_ranks > 1:
        times = launch(_collective_times, num_ranks, num_ranks, repeats)[0]
        latency, link = fit_link(times, num_ranks)
    return Hardware(
        name=name,
        memory=_memory(device),
        reserved=0,
        flops=peak,
        bandwidth=copied,
        node_size=num_ranks,
        node_bandwidth=link,
        network_bandwidth=link,
        node_latency=latency,
        network_latency=latency,
        num_cores=_num_cores(device),
        efficiency=1.0,
        half_size=half,
        attention_efficiency=attention,
        bandwidth_efficiency=1.0,
        link_efficiency=1.0,
        network_efficiency=1.0,
    )


def fit_line(times: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Peak FLOP/s and ``half_size`` of products of (WIDTH, k) by (k, WIDTH).

    Seconds are ``2 WIDTH**2 (k + half_size) / peak``: a line in k, by least relative squares.

    Args:
        times: of each k.
    """
    weights = [1 / seconds**2 for _, seconds in times]
    total = sum(weights)
    mean_k = sum(w * k for w, (k, _) in zip(weights, times, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, times, strict=True)) / total
    over = sum(w * (k - mean_k) * (t - mean_t) for w, (k, t) in zip(weights, times, strict=True))
    under = sum(w * (k - mean_k) ** 2 for w, (k, _) in zip(weights, times, strict=True))
    slope = over / under if over > 0 else times[-1][1] / times[-1][0]
    return 2 * WIDTH**2 / slope, max(0.0, mean_t / slope - mean_k)


def fit_link(times: Sequence[tuple[int, float]], num_ranks: int) -> tuple[float, float]:
    """Latency and bytes/s of all-gathers by a ring, of a small and a large tensor.

    Args:
        times: bytes of the whole tensor, and seconds.
        num_ranks: of the ring.
    """
    (small, first), (large, second) = times
    share = (num_ranks - 1) / num_ranks
    bandwidth = share * (large - small) / max(second - first, 1e-9)
    return max(1e-9, (first - share * small / bandwidth) / (num_ranks - 1)), bandwidth


def write_hardware(path: Path, machine: Hardware) -> None:
    """As TOML that ``hardware.hardware`` reads, atomically."""
    lines = ["# Measured on the machine at hand; efficiencies are of what was reached."]
    for key, value in machine.to_dict().items():
        lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value!r}")
    atomic_write_text(path, "\n".join(lines) + "\n")


def _fastest(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product(k: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    x = torch.randn(WIDTH, k, device=device, dtype=dtype)
    weight = torch.randn(WIDTH, k, device=device, dtype=dtype)
    return _fastest(lambda: torch.nn.functional.linear(x, weight), device, repeats)


def _copy(device: torch.device, repeats: int) -> float:
    """Bytes/s read and written by a copy that no cache holds."""
    x = torch.zeros(1 << 26, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _fastest(lambda: y.copy_(x), device, repeats)


def _attention(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a causal attention, in the FLOPs that the mask leaves."""
    heads, length, width = _ATTENTION
    x = torch.randn(1, heads, length, width, device=device, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = _fastest(lambda: attend(x, x, x, is_causal=True), device, repeats)
    return 2 * heads * length**2 * width / seconds


def _collective_times(num_ranks: int, repeats: int) -> list[tuple[int, float]]:
    device = _device()
    found = []
    for size in _MESSAGES:
        whole = torch.zeros(size // 4 // num_ranks * num_ranks, device=device)
        mine = whole.chunk(num_ranks)[dist.get_rank()].clone()
        parts = list(whole.chunk(num_ranks))
        times = [
            _fastest(lambda: dist.all_gather(parts, mine), device, 1)  # noqa: B023
            for _ in range(repeats)
        ]
        found.append((whole.nbytes, statistics.median(times)))
    return found


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _num_cores(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1
