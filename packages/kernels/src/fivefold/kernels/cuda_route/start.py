"""Start CUDA C++ kernels on torch's current stream; or record what would be started."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.cuda_route.program import Program
from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.launch import CudaLaunch, recording

# What every GPU gives a block without being asked: bytes of shared memory, blocks in a cluster.
_USUAL_SHARED_BYTES = 48 * 1024
_USUAL_CLUSTER = 8

# The driver's name for the stream that torch calls 0.
_DEFAULT_STREAM = 1


def launch(
    program: Program,
    kernel: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Tensor | float | None,
    shared_bytes: int = 0,
    cluster: tuple[int, ...] = (),
    cooperative: bool = False,
) -> None:
    """Start a kernel on the device of its first tensor; nothing happens where the grid is empty.

    Args:
        program: the file it is in.
        kernel: its name.
        grid: blocks along up to three dims.
        block: threads along up to three dims.
        arguments: tensors become pointers and None the null pointer, ints and bools
            ``long long``, floats ``double``.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster along each dim of the grid; the default is no clusters.
        cooperative: start all blocks at once, so that they may wait for each other.

    Raises:
        KernelInputError: clusters do not divide the grid, no argument is a tensor of a GPU, or it
            has no room for all blocks of a cooperative grid at once.
        CompileError: NVRTC refuses the file, with what it said.
    """
    if cluster and (len(cluster) != len(grid) or any(map(int.__mod__, grid, cluster))):
        raise KernelInputError(f"clusters of {cluster} blocks do not divide a grid of {grid}")
    if 0 in grid:
        return
    started = CudaLaunch(
        program=program,
        kernel=kernel,
        grid=grid,
        block=block,
        arguments=arguments,
        shared_bytes=shared_bytes,
        cluster=cluster,
        cooperative=cooperative,
    )
    recorded = recording()
    if recorded is not None:
        recorded.append(started)
        return
    index = _device(kernel, arguments)
    with torch.cuda.device(index):
        _start(started, index)


def _start(started: CudaLaunch, index: int) -> None:
    from cuda import core

    core.Device(index).set_current()
    # Not cuda.core's own object for the default stream: it remembers the device of its first use.
    stream = torch.cuda.current_stream(index).cuda_stream or _DEFAULT_STREAM
    cluster_blocks = math.prod(started.cluster)
    kernel = _kernel(started.program, started.kernel, index, started.shared_bytes, cluster_blocks)
    try:
        core.launch(
            core.Stream.from_handle(stream),
            _config(core, started),
            kernel,
            *map(_argument, started.arguments),
        )
    except ValueError as error:
        raise KernelInputError(f"{started.kernel} cannot start: {error}") from error


def _config(core: Any, started: CudaLaunch) -> Any:
    config: dict[str, Any] = {
        "grid": started.grid,
        "block": started.block,
        "shmem_size": started.shared_bytes,
    }
    if started.cluster:
        # cuda.core counts a grid in clusters.
        config["grid"] = tuple(map(int.__floordiv__, started.grid, started.cluster))
        config["cluster"] = started.cluster
    if started.cooperative:
        renamed = hasattr(core.LaunchConfig, "is_cooperative")
        config["is_cooperative" if renamed else "cooperative_launch"] = True
    return core.LaunchConfig(**config)


@cache
def _kernel(
    program: Program, kernel: str, index: int, shared_bytes: int, cluster_blocks: int
) -> Any:
    """A kernel loaded for a device, allowed the shared memory and the cluster that it asks for."""
    from cuda import core
    from cuda.bindings import driver

    loaded = _loaded(program, _arch(index)).get_kernel(kernel)
    wanted = driver.CUfunction_attribute
    if shared_bytes > _USUAL_SHARED_BYTES:
        attribute = wanted.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _allow(driver, loaded, attribute, shared_bytes, core.Device(index))
    if cluster_blocks > _USUAL_CLUSTER:
        attribute = wanted.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _allow(driver, loaded, attribute, 1, core.Device(index))
    return loaded


def _allow(driver: Any, kernel: Any, attribute: Any, value: int, device: Any) -> None:
    (status,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, device.device_id)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelInputError(f"{attribute.name} of {value} is more than this GPU has: {status}")


@cache
def _loaded(program: Program, arch: str) -> Any:
    from cuda import core

    return core.ObjectCode.from_cubin(program.cubin(arch), name=program.source.name)


@cache
def _arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    # From Hopper on, the instructions of one architecture alone are what kernels are written for.
    return f"sm_{major}{minor}" + "a" * (major >= 9)


def _device(kernel: str, arguments: tuple[Any, ...]) -> int:
    found = [x.device for x in arguments if isinstance(x, Tensor)]
    if not found or found[0].type != "cuda":
        where = found[0] if found else "none"
        raise KernelInputError(f"{kernel} takes tensors of a CUDA device, found {where}")
    return int(found[0].index)


def _argument(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return value
    # cuda.core passes any int as 8 bytes, and a null pointer is eight of them too.
    return 0 if value is None else int(value)
