"""The floor under a case: how fast this machine could do its least work.

``floor = max(bytes / copy rate, flops / matmul rate)`` seconds: Williams, Waterman and Patterson,
Roofline, 2009. Both rates are measured in the same run, so that the floor is that of the machine
as it is now. Data that stay in a cache can beat it, since the copy is larger than any cache; so
can products in float8, whose rate is above that of the inputs' dtype.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from fivefold.kernels.bench.stopwatch import Stopwatch
from fivefold.kernels.samples import Cost

_SECONDS = 0.3
_AT_LEAST = 3  # times, however busy the machine is
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


class Roofline:
    """Rates of a device, each measured when it is first asked for.

    Args:
        device: a device's type.
        watch: what times it.

    Attributes:
        copy_rate: bytes read and written in a second, None while nobody asked.
        matmul_rates: FLOP/s by dtype's name.
    """

    def __init__(self, device: str, watch: Stopwatch):
        self._device, self._watch = device, watch
        self.copy_rate: float | None = None
        self.matmul_rates: dict[str, float] = {}

    def floor(self, cost: Cost, dtype: torch.dtype) -> float:
        """Seconds of the least work.

        Args:
            cost: bytes and FLOPs.
            dtype: of the operands of its products.
        """
        return max(
            cost.bytes / self._copy() if cost.bytes else 0.0,
            cost.flops / self._matmul(dtype) if cost.flops else 0.0,
        )

    def _copy(self) -> float:
        if self.copy_rate is None:
            size = _COPY_BYTES[self._device]
            source = torch.ones(size, dtype=torch.uint8, device=self._device)
            target = torch.empty_like(source)
            self.copy_rate = 2 * size / self._shortest(lambda: target.copy_(source))
        return self.copy_rate

    def _matmul(self, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        if name not in self.matmul_rates:
            size = _MATMUL_SIZE[self._device]
            # Random, since a GPU multiplies ones at a higher clock than anything else.
            a = torch.randn(size, size, device=self._device).to(dtype)
            b, out = a.clone(), torch.empty_like(a)
            self.matmul_rates[name] = 2 * size**3 / self._shortest(lambda: torch.mm(a, b, out=out))
        return self.matmul_rates[name]

    def _shortest(self, call: Callable[[], Any]) -> float:
        call()
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < _AT_LEAST or time.perf_counter() < end:
            times.append(self._watch.time(call)[self._watch.basis])
        return max(min(times), 1e-9)


def total(first: Cost, second: Cost) -> Cost:
    """The cost of one after the other."""
    return Cost(bytes=first.bytes + second.bytes, flops=first.flops + second.flops)
