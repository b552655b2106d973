"""What ``fivefold-kernels which`` does."""

import argparse
from collections.abc import Sequence
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.kernels.arguments import FAILED
from fivefold.kernels.backends import asked_everywhere, chosen_unasked
from fivefold.kernels.errors import BackendError
from fivefold.kernels.op import OPS, Op
from fivefold.kernels.samples import Maker, OpSamples, load
from fivefold.kernels.selection import select


def which(options: argparse.Namespace) -> int:
    """``fivefold-kernels which``; 1 where an op cannot be imported or called."""
    status = 0
    for package, name in select(options.ops):
        try:
            _print_op(package, name)
        except Exception as error:  # whatever: an op in the making must not hide the others
            if options.debug:
                raise
            print(f"{package}/{name}: {type(error).__name__}: {error}")
            status = FAILED
    return status


def _print_op(package: str, name: str) -> None:
    op = load(name, package)
    print(f"{package}/{name}, called with {op.laptop[0].name}")
    for device in ("cpu", "cuda"):
        _print_device(op, device)


def _print_device(op: OpSamples, device: str) -> None:
    absent = device == "cuda" and not torch.cuda.is_available()
    # Meta tensors stand for those of a GPU that is not there.
    shown = "meta" if absent else device
    print(f"  tensors on {device}" + " (no such device here: shown as meta)" * absent)
    for called, inputs in _calls(op, shown):
        print(f"    {called.name}: {_chosen(called, inputs)}")
        for backend in called.backends:
            reason = _why_not(called, backend, inputs, shown)
            if reason is not None:
                print(f"      not {backend}: {reason}")


def _chosen(op: Op, inputs: Sequence[Any]) -> str:
    try:
        return op.choose(inputs)
    except BackendError as error:
        return f"nothing: {error}"


def _why_not(op: Op, backend: str, inputs: Sequence[Any], device: str) -> str | None:
    """The reason why a backend does not run a call, None of the one that does."""
    chosen = _chosen(op, inputs)
    if backend == chosen:
        return None
    reason = op.refusal(backend, inputs)
    everywhere = asked_everywhere()
    if reason is None and everywhere:
        return f"it can, and FIVEFOLD_BACKEND asks for {everywhere}"
    if reason is None and not chosen_unasked(backend, device):
        reason = "Triton's interpreter runs only where it is asked for by name"
    return reason or f"it can, and {chosen} comes first"


def _calls(op: OpSamples, device: str) -> list[tuple[Op, tuple[Any, ...]]]:
    """The registered ops that a call and its gradients reach, each once, with their inputs."""
    sample = op.laptop[0]
    dtype = (sample.dtypes or op.real_dtypes)[0]
    if device == "cpu" and torch.float32 in (sample.dtypes or op.dtypes):
        dtype = torch.float32
    inputs = sample.inputs(Maker(dtype=dtype, device=device))
    with _Watch() as watch:
        outputs = op.function(**inputs, backend="reference")
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs or ())
        reached = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        sources = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if reached and sources:
            weights = [torch.ones_like(x) for x in reached]
            torch.autograd.grad(reached, sources, weights, allow_unused=True)
    return list(watch.calls.values())


class _Watch(TorchDispatchMode):
    """Keeps the first call of every op of ours, and computes nothing: results are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Op, tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        op = OPS.get(func.name())
        if op is None:
            return func(*args, **(kwargs or {}))
        self.calls.setdefault(op.qualified, (op, args[:-1]))
        return unwrap(op)(*args)
