"""Find all kernels: run every op of every package on ``meta`` tensors and see what it starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.launch import CudaLaunch, Launch, Launches, record
from fivefold.kernels.offline.builds import Build, build_of, moved_bytes
from fivefold.kernels.samples import Inputs, Maker, OpSamples, Sample, load


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a kernel was seen first.

    Attributes:
        package: of the op.
        op: its name.
        sample: the name of the call.
        dtype: of the call's floating-point tensors.
        moved_bytes: of the tensors that the kernel takes.
        tensor_cores: whether the op's kernels must use tensor cores.
        follows_indices: whether its accesses cannot be wide.
    """

    package: str
    op: str
    sample: str
    dtype: str
    moved_bytes: int = 0
    tensor_cores: bool = False
    follows_indices: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What could not be compiled, and why.

    Attributes:
        origin: where it was seen.
        kernel: its name; "" where the op did not even come to start one.
        target: the architecture; "" for all.
        error: the reason in one line or more.
        expected: whether the target lacks what the kernel is about, which is no fault.
    """

    origin: Origin
    kernel: str = ""
    target: str = ""
    error: str
    expected: bool = False


Found = dict[Build, Origin]


def gather(
    ops: Sequence[tuple[str, str]], capability: tuple[int, int] = (9, 0)
) -> tuple[Found, list[Failure]]:
    """Every distinct kernel of these ops at the sizes of models, and what went wrong.

    A kernel that several calls start alike is that of the first of them.

    Args:
        ops: packages and names.
        capability: the compute capability of the GPU to start them on.
    """
    found: Found = {}
    failures: list[Failure] = []
    for package, name in ops:
        try:
            op = load(name, package)
        except Exception as error:  # whatever: an op in the making must not hide the others
            origin = Origin(package=package, op=name, sample="", dtype="")
            failures.append(Failure(origin=origin, error=_text(error)))
            continue
        for sample, dtype in _calls(op):
            with record(capability) as launches:
                _gather_call(package, op, sample, dtype, launches, found, failures)
    return found, failures


def _calls(op: OpSamples) -> Iterator[tuple[Sample, torch.dtype]]:
    for sample in op.real:
        for dtype in sample.dtypes or op.real_dtypes:
            yield sample, dtype


def _gather_call(
    package: str,
    op: OpSamples,
    sample: Sample,
    dtype: torch.dtype,
    launches: Launches,
    found: Found,
    failures: list[Failure],
) -> None:
    origin = Origin(
        package=package,
        op=op.name,
        sample=sample.name,
        dtype=str(dtype).removeprefix("torch."),
        tensor_cores=op.tensor_cores,
        follows_indices=op.follows_indices,
    )
    for backend in _backends(op):
        launches.clear()
        error = _call(op, sample, dtype, backend)
        if error is not None:
            failures.append(Failure(origin=origin, error=f"{backend}: {_text(error)}"))
        for launch in launches:
            _add(launch, origin, found, failures)


def _add(
    launch: Launch | CudaLaunch, origin: Origin, found: Found, failures: list[Failure]
) -> None:
    try:
        build = build_of(launch)
    except Exception as error:  # a launch that Triton itself could not start
        kernel = launch.kernel if isinstance(launch, CudaLaunch) else launch.kernel.__name__
        failures.append(Failure(origin=origin, kernel=kernel, error=_text(error)))
        return
    found.setdefault(build, replace(origin, moved_bytes=moved_bytes(launch)))


def _backends(op: OpSamples) -> list[str]:
    """The backends of an op that have kernels to compile."""
    folder = op.function.__module__
    # The module of a function that lies in the op's own file is not the folder.
    if not hasattr(import_module(folder), "__path__"):
        folder = folder.rpartition(".")[0]
    return [name for name in ("triton", "cuda") if find_spec(f"{folder}.{name}") is not None]


def _call(op: OpSamples, sample: Sample, dtype: torch.dtype, backend: str) -> Exception | None:
    """Call an op and its gradients, as far as they come; returns why they come no further."""
    try:
        inputs = sample.inputs(Maker(dtype=dtype, device="meta"))
        _differentiate(op.function(**inputs, backend=backend), inputs)
    except Exception as error:  # reported with the op's name
        return error
    return None


def _differentiate(outputs: Any, inputs: Inputs) -> None:
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())
    reached = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    sources = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    if reached and sources:
        weights = [torch.empty_like(x) for x in reached]
        torch.autograd.grad(reached, sources, weights, allow_unused=True)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
