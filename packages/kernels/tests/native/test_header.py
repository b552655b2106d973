"""What ``fivefold.h`` gives to kernels: conversions, sums, functions and threads."""

import threading
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from fivefold.kernels import native

SOURCE = Path(__file__).with_name("header.cpp")


@pytest.fixture(scope="module")
def library() -> CDLL:
    return native.load(SOURCE)


def _convert(library: CDLL, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.full((x.numel() + 2,), 7, dtype=dtype)
    types = native.TYPES[x.dtype], native.TYPES[dtype]
    native.call(library.convert, *types, x, y[1:-1], x.numel())
    assert y[0] == 7 and y[-1] == 7
    return y[1:-1]


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    equal = found.view(bits) == expected.view(bits)
    assert (equal | (found.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens_as_in_torch(library: CDLL, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    _same(_convert(library, every, torch.float32), every.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(library: CDLL, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    # Each value, what is half-way to the next one, and the neighbours of both.
    half = 0x8000 if dtype == torch.bfloat16 else 0x1000
    steps = torch.tensor([0, 1, half - 1, half, half + 1, -1])
    near = (every.view(torch.int32)[:, None] + steps.to(torch.int32)).view(torch.float32).flatten()
    wild = torch.randint(-(2**31), 2**31, (99_991,)).to(torch.int32).view(torch.float32)
    for x in (near, wild):
        _same(_convert(library, x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 33, 64, 65, 150])
def test_sums_and_copies_of_any_length(library: CDLL, dtype: torch.dtype, n: int) -> None:
    x = torch.randint(-50, 50, (n,)).to(dtype)
    amid = torch.cat([torch.full((1,), torch.nan), x, torch.full((99,), torch.nan)]).to(dtype)
    total = torch.empty(2, dtype=dtype)
    native.call(library.sums, native.TYPES[dtype], amid[1:], n, total)
    assert total[0] == x.sum()
    assert total[1] == (x + 1).sum()
    _same(_convert(library, x, dtype), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_sigmoid(library: CDLL, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 88.8, 200, -200], dtype=dtype)
    x = torch.cat([special, torch.linspace(-103, 88.7, 20_001, dtype=dtype)])
    exp, sigmoid = torch.empty_like(x), torch.empty_like(x)
    native.call(library.functions, native.TYPES[dtype], x, exp, sigmoid, x.numel())
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(
        exp.double(), x.double().exp().to(dtype).double(), rtol=step, atol=1e-44, equal_nan=True
    )
    torch.testing.assert_close(
        sigmoid.double(), x.double().sigmoid(), rtol=4 * step, atol=1e-38, equal_nan=True
    )
    assert sigmoid[1] == 1 and sigmoid[2] == 0 and sigmoid[0] == 0.5


@pytest.mark.parametrize(
    ("begin", "end", "grain", "threads", "parts"),
    [
        (0, 10, 1, 1, 1),
        (0, 10, 1, 3, 3),
        (3, 14, 1, 4, 4),
        (0, 10, 4, 8, 2),
        (0, 3, 4, 8, 1),
        (0, 8, 0, 8, 8),
        (5, 5, 1, 4, 1),
        (5, 2, 1, 4, 1),
    ],
)
def test_parts_cover_the_items(
    library: CDLL, begin: int, end: int, grain: int, threads: int, parts: int
) -> None:
    owner = torch.full((20,), -1)
    made = torch.zeros(1, dtype=torch.int64)
    native.call(library.parts, begin, end, grain, threads, owner, made)
    assert int(made) == parts
    assert (owner[:begin] == -1).all() and (owner[max(begin, end) :] == -1).all()
    sizes = torch.bincount(owner[begin : max(begin, end)], minlength=parts)
    if begin < end:
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == parts
        assert (owner[begin:end].diff() >= 0).all()


def test_many_callers_and_nested_calls(library: CDLL) -> None:
    wrong = []

    def call() -> None:
        count = torch.zeros(1, dtype=torch.int64)
        for _ in range(200):
            native.call(library.nested, 3, count)
        if int(count) != 200 * 9:
            wrong.append(int(count))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_workers_that_fell_asleep_wake_up(library: CDLL) -> None:
    seen = torch.zeros(1, dtype=torch.int64)
    # Each part waits for the other: one thread alone would stay for ever.
    for pause in (0.0, 0.05, 0.0):
        threading.Event().wait(pause)
        native.call(library.together, seen)
    assert int(seen) == 6
