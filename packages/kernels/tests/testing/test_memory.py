"""Poisoned and fenced memory."""

import ctypes
import faulthandler
import multiprocessing

import pytest
import torch
from torch import Tensor

from fivefold.kernels.testing import memory


@pytest.mark.parametrize("make", [memory.contiguous, memory.strided, memory.transposed])
def test_values_outside_and_between_are_nan(make: object) -> None:
    x: Tensor = make((3, 4), dtype=torch.float32, device="cpu")
    x.fill_(1.0)
    everything = torch.empty(0).set_(x.untyped_storage())
    assert int((everything == 1).sum()) == 12
    assert int(everything.isnan().sum()) == everything.numel() - 12
    assert not x._is_view()


def test_layouts_in_memory() -> None:
    assert memory.strided((3, 4), dtype=torch.float32, device="cpu").stride() == (12, 3)
    assert memory.transposed((3, 4), dtype=torch.float32, device="cpu").stride() == (1, 3)
    assert memory.contiguous((3, 4), dtype=torch.float32, device="cpu").is_contiguous()


def test_empties_are_nan_within() -> None:
    like = torch.ones(2, 3, dtype=torch.bfloat16)
    with memory.poisoned():
        made = [
            torch.empty(2, 3),
            torch.empty((2, 3), dtype=torch.float64),
            torch.empty_like(like),
            like.new_empty(4),
            like.new_empty((2, 2), dtype=torch.float32),
        ]
        assert torch.empty(2, dtype=torch.int64).tolist() == [-123, -123]
    assert all(x.isnan().all() for x in made)
    assert [x.dtype for x in made[2:]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert made[1].dtype == torch.float64
    assert made[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize(("offset", "side"), [(-1, "before"), (4, "after")])
def test_a_write_outside_is_found(offset: int, side: str, value: float, dtype: torch.dtype) -> None:
    def write() -> None:
        with memory.poisoned():
            x = torch.empty(4, dtype=dtype)
            flat = torch.empty(0, dtype=dtype)  # a tensor whose own margins stay as they are
            flat.set_(x.untyped_storage(), x.storage_offset() + offset, (1,)).fill_(value)
            flat.set_()

    with pytest.raises(AssertionError, match=f"1 values were written {side} a tensor of shape"):
        write()


def test_fenced_memory_holds_values_and_ends_a_process_that_reads_on() -> None:
    x = memory.fenced((5, 3), dtype=torch.float32, device="cpu")
    x.copy_(torch.arange(15.0).view(5, 3))
    assert float(x.sum()) == 105.0

    def read_on() -> None:
        faulthandler.disable()  # what should happen needs no report
        ctypes.string_at(x.data_ptr(), 4 * 15 + 1)

    child = multiprocessing.get_context("fork").Process(target=read_on)
    child.start()
    child.join()
    assert child.exitcode == -11
