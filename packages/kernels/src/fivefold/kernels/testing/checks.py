"""What every op must hold: one function for each law, usable on any ``OpSamples``.

They raise ``AssertionError`` with the op, the result and the first wrong value.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fivefold.kernels.errors import BackendError
from fivefold.kernels.op import OPS, Op, specification
from fivefold.kernels.samples import Inputs, Maker, OpSamples, Sample
from fivefold.kernels.testing import memory
from fivefold.kernels.testing.tolerances import TOLERANCES, assert_close

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": memory.contiguous,
    "strided": memory.strided,
    "transposed": memory.transposed,
    "fenced": memory.fenced,
}
Results = dict[str, Tensor]


def check_values(
    op: OpSamples,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    layout: str = "contiguous",
    device: str = "cpu",
) -> None:
    """Results and every gradient equal the float64 specification; no foreign memory is touched.

    Args:
        op: whose samples these are.
        sample: the call.
        backend: what runs it.
        dtype: of its floating-point tensors.
        layout: of those tensors in memory: contiguous, strided (gaps in every dim), transposed, or
            fenced (a read past the end ends the process).
        device: where it runs.
    """
    maker = Maker(dtype=dtype, device=device, allocate=LAYOUTS[layout])
    inputs = sample.inputs(maker)
    with memory.poisoned(behind_fence=layout == "fenced"):
        found = differentiate(
            lambda: op.function(**inputs, backend=backend), inputs, LAYOUTS[layout]
        )
    exact = _in_float64(inputs)
    with specification():
        expected = differentiate(lambda: op.function(**exact), exact)
    if found.keys() != expected.keys():
        raise AssertionError(
            f"{op.name}({sample.name}) on {backend} gives {sorted(found)} instead of "
            f"{sorted(expected)}"
        )
    for name, value in expected.items():
        label = f"{op.name}({sample.name}) on {backend}, {layout}: {name}"
        assert_close(label, found[name], value, _precision(found[name], dtype))


def check_backend(op: OpSamples, backend: str) -> None:
    """All samples that it takes, also strided and fenced: what a broken kernel cannot pass."""
    for sample in op.small:
        for dtype in sample.dtypes or (usual_dtype(op),):
            with suppress(BackendError):
                check_values(op, sample, backend, dtype)
    for sample in op.small[:4]:
        dtype = (sample.dtypes or (usual_dtype(op),))[0]
        for layout in ("strided", "fenced"):
            with suppress(BackendError):
                check_values(op, sample, backend, dtype, layout)


def check_takes_some(op: OpSamples, backend: str) -> None:
    """A backend runs at least one of the samples in one of their dtypes."""
    for sample in op.small:
        for dtype in sample.dtypes or op.dtypes:
            with suppress(BackendError):
                inputs = sample.inputs(Maker(dtype=dtype))
                op.function(**inputs, backend=backend)
                return
    raise AssertionError(f"{op.name} on {backend} takes none of its samples")


def usual_dtype(op: OpSamples) -> torch.dtype:
    """What most checks run in: float32 where the op takes it."""
    return torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]


def check_compiled(op: OpSamples, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    """``torch.compile(fullgraph=True)`` gives bit for bit what eager calls give."""
    inputs = sample.inputs(Maker(dtype=dtype))
    torch.compiler.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    eager = differentiate(lambda: op.function(**inputs, backend=backend), inputs)
    found = differentiate(lambda: compiled(**inputs, backend=backend), inputs)
    for name, value in eager.items():
        if not torch.equal(found[name], value):
            raise AssertionError(f"{op.name}({sample.name}): {name} differs when compiled")


def check_registration(op: OpSamples, sample: Sample, dtype: torch.dtype) -> None:
    """``torch.library.opcheck`` passes on every registered op that the sample reaches."""
    inputs = sample.inputs(Maker(dtype=dtype))
    with _recorded() as calls:
        differentiate(lambda: op.function(**inputs, backend="reference"), inputs)
    if not calls:
        raise AssertionError(f"{op.name}({sample.name}) reaches no registered op")
    for called, arguments in calls:
        if not OPS[called].differentiable:  # as autograd calls a backward op
            arguments = tuple(_plain(value, requires_grad=False) for value in arguments)
        torch.library.opcheck(OPS[called].overload, arguments)


def differentiate(
    function: Callable[[], Any], inputs: Inputs, allocate: Callable[..., Tensor] | None = None
) -> Results:
    """Results by position and gradients by input's name, for fixed random output gradients.

    Args:
        function: computes the results.
        inputs: what it reads.
        allocate: makes the memory of the output gradients; the default is plain.
    """
    outputs = function()
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    results = {f"result {i}": output.detach() for i, output in enumerate(outputs)}
    sources = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    reached = [output for output in outputs if output.requires_grad]
    if reached and sources:
        generator = torch.Generator().manual_seed(1)
        weights = [_like_normal(output, generator, allocate) for output in reached]
        gradients = torch.autograd.grad(reached, list(sources.values()), weights, allow_unused=True)
        for name, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                results[f"gradient of {name}"] = gradient
    return results


def _like_normal(
    x: Tensor, generator: torch.Generator, allocate: Callable[..., Tensor] | None
) -> Tensor:
    # Through bfloat16, so that every dtype has the very same values.
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    if allocate is None:
        return drawn.to(dtype=x.dtype, device=x.device)
    return allocate(tuple(x.shape), dtype=x.dtype, device=x.device).copy_(drawn)


def _in_float64(inputs: Inputs) -> Inputs:
    return {name: _wide(value) for name, value in inputs.items()}


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().cpu().to(torch.float64).contiguous().requires_grad_(value.requires_grad)


def _precision(found: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The coarser of what came in and what came out: float32 statistics of bfloat16 stay coarse."""
    fine = list(TOLERANCES)  # in the order of their precision
    return max((found.dtype, dtype), key=fine.index)


@contextmanager
def _recorded() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    run = Op._run

    def record(self: Op, *arguments: Any) -> Any:
        calls.append((self.qualified, tuple(_plain(value) for value in arguments)))
        return run(self, *arguments)

    with patch.object(Op, "_run", record):
        yield calls


def _plain(value: Any, requires_grad: bool | None = None) -> Any:
    """A copy without history; the default keeps ``requires_grad``."""
    if isinstance(value, Tensor):
        wanted = value.requires_grad if requires_grad is None else requires_grad
        return value.detach().clone().requires_grad_(wanted)
    if isinstance(value, list | tuple):
        return type(value)(_plain(each, requires_grad) for each in value)
    return value
