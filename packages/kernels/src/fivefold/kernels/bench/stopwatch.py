"""How one call is timed on a CPU, on a GPU, and on a GPU as a recorded graph."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fivefold.kernels.bench.calls import Call
from fivefold.kernels.bench.rounds import Reading, Timer

# What a block of calls takes at least on a CPU, so that reading the clocks does not count.
_BLOCK_SECONDS = 1e-3
_MOST_CALLS = 1000

# On a GPU below this the time between kernels counts as much as the kernels.
LAUNCH_BOUND_SECONDS = 3e-4


class Stopwatch(Protocol):
    """Times calls.

    Attributes:
        basis: the clock that ratios are read from first.
    """

    basis: str

    def time(self, call: Callable[[], Any]) -> Reading:
        """Seconds of one call by clock."""
        ...

    def timer(self, call: Call) -> Timer:
        """Times a call each time it is called; what it needs before is done in here."""
        ...


class CPUStopwatch:
    """Process CPU time and wall time.

    Args:
        threads: with one, ratios are of CPU time, which other processes disturb less; with more it
            is a sum over threads, and ratios are of wall time.
    """

    def __init__(self, threads: int):
        self.basis = "cpu" if threads == 1 else "wall"

    def time(self, call: Callable[[], Any], calls: int = 1) -> Reading:
        """Seconds of one call out of a block of them, by clock."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu / calls, "wall": wall / calls}

    def timer(self, call: Call) -> Timer:
        """Times a block of calls, or one where the values have to be restored."""
        if call.writes:
            return lambda: _restored(call, self.time(call))
        once = min(self.time(call)["cpu"] for _ in range(3))
        calls = min(_MOST_CALLS, math.ceil(_BLOCK_SECONDS / max(once, 1e-9)))
        return lambda: self.time(call, calls)


class GPUStopwatch:
    """Events around a call that finds nothing of its data in the L2 cache.

    Args:
        flush: writes more bytes than the L2 cache holds; the default does.
    """

    basis = "gpu"

    def __init__(self, flush: Callable[[], Any] | None = None):
        self._flush = flush or _l2_flush()

    def time(self, call: Callable[[], Any]) -> Reading:
        """Seconds from the call's first kernel until its last one has ended."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return {"gpu": begin.elapsed_time(end) / 1000}

    def timer(self, call: Call) -> Timer:
        """Times a call as it is made from Python."""
        _restored(call, self.time(call))
        return lambda: _restored(call, self.time(call))

    def graph_timer(self, call: Call) -> Timer:
        """Times a call's kernels alone: recorded once as a CUDA graph, then replayed.

        Raises:
            Exception: it cannot be recorded, for example since it waits for the GPU.
        """
        graph = _recorded(call)
        call.restore()
        return lambda: _restored(call, {"graph": self.time(graph.replay)["gpu"]})


def _restored(call: Call, reading: Reading) -> Reading:
    """The reading, with the values as others have to find them."""
    if call.writes:
        call.restore()
    return reading


def _recorded(call: Call) -> torch.cuda.CUDAGraph:
    # What is set up at first use on a stream must not end up in the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _l2_flush() -> Callable[[], Any]:
    size = torch.cuda.get_device_properties("cuda").L2_cache_size
    buffer = torch.empty(max(2 * size, 1 << 26), dtype=torch.uint8, device="cuda")
    return buffer.zero_
