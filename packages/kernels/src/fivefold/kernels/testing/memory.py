"""Memory that shows who reads or writes what is not theirs: NaN around, between and before values.

Kernels on the CPU read past a tensor without a fault, so a forgotten mask has to show in numbers;
or, behind a fence, in a fault, which only a child process should risk.
"""

import ctypes
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Values on each side of a tensor that belong to nobody. A tile in the samples is no wider.
_MARGIN = 512
_INTEGER_POISON = -123
# NaN that no arithmetic makes: a NaN that is computed and written into a margin shows too.
_MARKED_NAN = {
    torch.float64: (0x7FF8DEAD0000BEEF, torch.int64),
    torch.float32: (0x7FC0BEEF, torch.int32),
    torch.float16: (0x7EBE, torch.int16),
    torch.bfloat16: (0x7FDE, torch.int16),
}


def contiguous(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """A contiguous tensor of NaN amid NaN."""
    return _amid_poison(tuple(shape), _steps(shape), dtype, device)[1]


def strided(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor of NaN whose every dim has gaps, with NaN in them."""
    return _amid_poison(tuple(shape), _steps(shape, gap=3), dtype, device)[1]


def transposed(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor of NaN whose dims lie in memory in the opposite order."""
    return _amid_poison(tuple(shape), _steps(shape[::-1])[::-1], dtype, device)[1]


def fenced(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """A contiguous tensor of NaN after which no memory can be read: that ends the process."""
    num_bytes = max(1, math.prod(shape)) * dtype.itemsize
    pages = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0):
        raise OSError("the page after a tensor could not be fenced")
    flat = torch.frombuffer(
        memory, dtype=dtype, offset=pages - num_bytes, count=num_bytes // dtype.itemsize
    )
    return flat[: math.prod(shape)].fill_(_poison(dtype)).detach().view(shape)


@contextmanager
def poisoned(*, behind_fence: bool = False) -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return with NaN, and fail where a margin changed.

    Args:
        behind_fence: whether those and copies are ``fenced`` instead of amid margins.
    """
    made: list[tuple[Tensor, Tensor]] = []
    torch_clone = torch.Tensor.clone

    def empty(*size: Any, **options: Any) -> Tensor:
        shape = tuple(size[0]) if size and not isinstance(size[0], int) else size
        dtype = options.get("dtype") or torch.get_default_dtype()
        if behind_fence:
            return fenced(shape, dtype=dtype, device="cpu")
        buffer, x = _amid_poison(shape, _steps(shape), dtype, options.get("device") or "cpu")
        made.append((buffer, x))
        return x

    def empty_like(x: Tensor, **options: Any) -> Tensor:
        return empty(
            x.shape, dtype=options.get("dtype") or x.dtype, device=options.get("device") or x.device
        )

    def new_empty(x: Tensor, *size: Any, **options: Any) -> Tensor:
        options = {"dtype": x.dtype, "device": x.device} | options
        return empty(*size, **options)

    def clone(x: Tensor, **options: Any) -> Tensor:
        if not behind_fence or x.requires_grad or options:
            return torch_clone(x, **options)
        return fenced(tuple(x.shape), dtype=x.dtype, device="cpu").copy_(x)

    with (
        patch.object(torch.Tensor, "clone", clone),
        patch.object(torch, "empty", empty),
        patch.object(torch, "empty_like", empty_like),
        patch.object(torch.Tensor, "new_empty", new_empty),
    ):
        yield
    for buffer, x in made:
        _check_margins(buffer, x)


def _amid_poison(
    shape: tuple[int, ...], steps: tuple[int, ...], dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    """A flat buffer of poison, and a tensor in its middle that is no view of it to autograd."""
    span = sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + 1
    buffer = _fresh(span + 2 * _MARGIN, dtype, device)
    x = torch.tensor([], dtype=dtype, device=device)
    return buffer, x.set_(buffer.untyped_storage(), _MARGIN, shape, steps)


def _steps(shape: Sequence[int], gap: int = 1) -> tuple[int, ...]:
    """Strides of a contiguous tensor, all of them times ``gap``."""
    steps, step = [], gap
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else _INTEGER_POISON


def _fresh(count: int, dtype: torch.dtype, device: Any) -> Tensor:
    if dtype not in _MARKED_NAN:
        return torch.full((count,), _poison(dtype), dtype=dtype, device=device)
    bits, integer = _MARKED_NAN[dtype]
    return torch.full((count,), bits, dtype=integer, device=device).view(dtype)


def _check_margins(buffer: Tensor, x: Tensor) -> None:
    for name, margin in (("before", buffer[:_MARGIN]), ("after", buffer[-_MARGIN:])):
        if buffer.dtype in _MARKED_NAN:
            bits, integer = _MARKED_NAN[buffer.dtype]
            kept = margin.view(integer) == bits
        elif buffer.dtype.is_floating_point:
            kept = margin.float().isnan()
        else:
            kept = margin == _poison(margin.dtype)
        if not kept.all():
            raise AssertionError(
                f"{int((~kept).sum())} values were written {name} a tensor of shape "
                f"{tuple(x.shape)}"
            )
