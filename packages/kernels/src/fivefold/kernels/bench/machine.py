"""What the figures were measured on."""

import dis
import os
import platform
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def describe(device: str, threads: int) -> dict[str, Any]:
    """Names and sizes of a device and of the CPU beside it."""
    machine: dict[str, Any] = {
        "device": device,
        "device_name": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties("cuda")
        machine |= {
            "device_name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return machine


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of what we stand on, and of the distributions of imported names.

    Args:
        libraries: top-level names; those that are not installed are left out.
    """
    found = {"python": platform.python_version()}
    distributions = {name for each in libraries for name in _distributions().get(each, ())}
    for name in ("torch", "triton", "fivefold-kernels", *sorted(distributions)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def imported_by(function: Callable[..., Any]) -> tuple[str, ...]:
    """Top-level names that a function imports inside, as peers do."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ()
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"]
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def missing(libraries: Iterable[str]) -> tuple[str, ...]:
    """Those of the top-level names that are not installed."""
    return tuple(name for name in libraries if find_spec(name) is None)


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
