"""Start Triton kernels; or record what would be started, for compilers without a GPU.

``fivefold.kernels.cuda_route`` starts those of CUDA C++.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fivefold.kernels.cuda_route.program import Program

Grid = tuple[int, ...]

# Triton 3.10 stops fusing multiplications with additions unless it is asked to.
FUSED_MULTIPLY_ADD = True

# Streaming multiprocessors of an H100, which recorded launches are made for.
_RECORDED_NUM_SMS = 132

_HOPPER = (9, 0)


class TensorCores(Enum):
    """Where the tensor cores of an architecture have what they work on: it decides what tiles fit.

    Attributes:
        REGISTERS: operands and sums in registers, as up to Ada and in workstations' Blackwell.
        SHARED_MEMORY: operands in shared memory, sums in registers: Hopper.
        TENSOR_MEMORY: sums in a memory of their own: data centres' Blackwell.
    """

    REGISTERS = "registers"
    SHARED_MEMORY = "shared memory"
    TENSOR_MEMORY = "tensor memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel with all that decides its machine code.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs along up to three dims.
        arguments: tensors and numbers, by position.
        constants: the ``tl.constexpr`` parameters.
        num_warps: warps of 32 threads in a program.
        num_stages: depth of the software pipeline.
    """

    kernel: Any
    grid: Grid
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaLaunch:
    """One kernel of CUDA C++ with all that decides how it runs.

    Attributes:
        program: the file it is in.
        kernel: its name.
        grid: blocks along up to three dims.
        block: threads along up to three dims.
        arguments: tensors and numbers, by position.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster along each dim of the grid; empty without clusters.
        cooperative: whether all blocks start at once.
    """

    program: "Program"
    kernel: str
    grid: Grid
    block: Grid
    arguments: tuple[Any, ...]
    shared_bytes: int
    cluster: Grid
    cooperative: bool


Launches = list[Launch | CudaLaunch]

_record: ContextVar[Launches | None] = ContextVar("_record", default=None)
_capability: ContextVar[tuple[int, int]] = ContextVar("_capability", default=_HOPPER)


@contextmanager
def record(capability: tuple[int, int] = _HOPPER) -> Iterator[Launches]:
    """Collect launches instead of starting them; run ops on ``meta`` tensors in it.

    Args:
        capability: the compute capability of the GPU that they are for.
    """
    launches: Launches = []
    tokens = _record.set(launches), _capability.set(capability)
    try:
        yield launches
    finally:
        _record.reset(tokens[0])
        _capability.reset(tokens[1])


def recording() -> Launches | None:
    """Where to put launches instead of starting them; None where they are to be started."""
    return _record.get()


def launch(
    kernel: Any,
    grid: Grid,
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Start a kernel on the device of its first tensor; nothing happens where the grid is empty.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three dims.
        arguments: what the kernel takes, by position, without constants.
        num_warps: warps of 32 threads in a program.
        num_stages: depth of the software pipeline.
        constants: the ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    recorded = recording()
    if recorded is not None:
        recorded.append(
            Launch(
                kernel=kernel,
                grid=grid,
                arguments=arguments,
                constants=constants,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
        return
    with _device(arguments):
        kernel[grid](
            *arguments,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
            **constants,
        )


def num_sms(x: Tensor) -> int:
    """Streaming multiprocessors of the device of ``x``; a small number in the interpreter."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return _RECORDED_NUM_SMS if x.is_meta else 2


def tensor_cores(x: Tensor) -> TensorCores:
    """Those of the device of ``x``, or of what launches are recorded for; else a Hopper's."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else _capability.get()
    kinds = {9: TensorCores.SHARED_MEMORY, 10: TensorCores.TENSOR_MEMORY}
    return kinds.get(capability[0], TensorCores.REGISTERS)


def _device(arguments: tuple[Any, ...]) -> Any:
    tensor = next(value for value in arguments if isinstance(value, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
