"""What there is to run a job with: versions, devices, backends, and what a launcher has set."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_BRAND = "fivefold-"
# Of torchrun, and of what decides where ranks and their messages go.
_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_DEBUG",
)
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def environment() -> dict[str, Any]:
    """All of it, as plain data; sizes in bytes. Makes no process group and needs none."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": _nccl(),
        "triton": _version("triton"),
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "cpu": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "cores_of_machine": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": memory(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def packages() -> dict[str, str]:
    """Version of each installed distribution of the family, by name."""
    found = {d.name: d.version for d in distributions() if d.name.startswith(_BRAND)}
    return dict(sorted(found.items()))


def memory() -> int | None:
    """Bytes of main memory that this process may use; None where the system does not say."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return min([size, *_limits()])


def _limits() -> Iterator[int]:
    """What a container may use of it."""
    for name in _CGROUP_LIMITS:
        try:
            yield int(Path(name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _nccl() -> str | None:
    if not dist.is_nccl_available():
        return None
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def table(found: dict[str, Any]) -> str:
    """``environment()`` for people, one line a fact."""
    rows = list(_rows(found))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("python", "platform"):
        yield name, found[name]
    yield from found["packages"].items()
    for name in ("torch", "cuda", "nccl", "triton"):
        yield name, found[name] or "none"
    for name, available in found["backends"].items():
        yield f"backend {name}", "available" if available else "not in this torch"
    yield "cpu", _cpu(found["cpu"])
    for index, gpu in enumerate(found["gpus"]):
        yield f"gpu {index}", f"{gpu['name']}, {_gib(gpu['memory'])}, sm {gpu['capability']}"
    if not found["gpus"]:
        yield "gpu", "none"
    for name, value in found["variables"].items():
        yield name, value


def _cpu(cpu: dict[str, Any]) -> str:
    usable = cpu["cores"] or cpu["cores_of_machine"]
    return (
        f"{usable} of {cpu['cores_of_machine']} cores, {cpu['threads']} threads of torch, "
        f"{_gib(cpu['memory'])}"
    )


def _gib(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / 2**30:.1f} GiB"
