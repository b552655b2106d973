"""The floor from rates that are set by hand, and rates from a clock that is."""

import pytest
import torch

from fivefold.kernels.bench.roofline import Roofline, total
from fivefold.kernels.samples import Cost


class Watch:
    basis = "cpu"

    def __init__(self, *seconds: float):
        self.readings = list(seconds)
        self.calls = 0

    def time(self, call):
        call()
        self.calls += 1
        return {"cpu": self.readings[min(self.calls, len(self.readings)) - 1], "wall": 1e-9}

    def timer(self, call):
        raise NotImplementedError


def test_floor_is_the_slower_of_memory_and_products() -> None:
    roofline = Roofline("cpu", Watch(1.0))
    roofline.copy_rate = 100.0
    roofline.matmul_rates = {"float32": 1000.0, "bfloat16": 4000.0}
    assert roofline.floor(Cost(bytes=200), torch.float32) == 2.0
    assert roofline.floor(Cost(bytes=200, flops=1000), torch.float32) == 2.0
    assert roofline.floor(Cost(bytes=200, flops=5000), torch.float32) == 5.0
    assert roofline.floor(Cost(bytes=0, flops=6000), torch.bfloat16) == 1.5
    assert roofline.floor(Cost(bytes=0), torch.float32) == 0.0


def test_rates_are_of_the_shortest_time_and_measured_once() -> None:
    watch = Watch(0.5, 0.25, 0.5)
    roofline = Roofline("cpu", watch)
    roofline.floor(Cost(bytes=1), torch.float32)
    assert roofline.copy_rate == 2 * 4096 / 0.25
    assert roofline.matmul_rates == {}
    calls = watch.calls
    roofline.floor(Cost(bytes=5), torch.float32)
    assert watch.calls == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_of_products_has_the_dtype(dtype: torch.dtype) -> None:
    roofline = Roofline("cpu", Watch(0.5))
    roofline.floor(Cost(bytes=0, flops=1), dtype)
    assert roofline.matmul_rates == {str(dtype).removeprefix("torch."): 2 * 8**3 / 0.5}


def test_total() -> None:
    assert total(Cost(bytes=1, flops=2), Cost(bytes=10, flops=20)) == Cost(bytes=11, flops=22)
