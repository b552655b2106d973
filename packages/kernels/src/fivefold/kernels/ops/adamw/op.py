"""``adamw_step`` and ``gradient_norm`` as registered ops: what they write, checks, layouts.

Neither has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.op import define
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.adamw.layout import Rows, alike, lie_alike

BACKENDS = ("triton", "cpu", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """The lists that ``adamw_step`` takes; those that are not wanted are empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    averages: list[Tensor]
    average_counts: list[Tensor]


@define(
    "fivefold_kernels",
    backends=BACKENDS,
    mutates=(
        "params",
        "exp_avgs",
        "exp_avg_sqs",
        "steps",
        "masters",
        "averages",
        "average_counts",
    ),
)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    average_counts: list[Tensor],
    settings: Tensor,
    scale: Tensor | None,
    maximize: bool,
    swa: bool,
    skip_nonfinite: bool,
    backend: str | None,
) -> None:
    """See the public function; tensors at one place of the lists share strides without gaps."""
    return None


@define("fivefold_kernels", backends=BACKENDS)
def gradient_norm(grads: list[Tensor], backend: str | None) -> Tensor:
    """Tensors without gaps to their common Euclidean norm, ()."""
    return torch.empty((), dtype=sum_dtype(grads[0].dtype), device=grads[0].device)


@torch.no_grad()
def apply(
    states: States,
    settings: Tensor,
    scale: Tensor | None,
    maximize: bool,
    swa: bool,
    skip_nonfinite: bool,
    backend: str | None,
) -> None:
    """See ``adamw_step``: check, lay alike, run, and write back what had to be copied."""
    if not states.params:
        return
    check(states, settings)
    grads = states.grads
    computed = sum_dtype(states.params[0].dtype)
    if (grads[0].dtype == torch.float64) != (computed == torch.float64):
        grads = [each.to(computed) for each in grads]
    given: Rows = [
        states.params,
        states.exp_avgs,
        states.exp_avg_sqs,
        states.masters,
        states.averages,
        grads,
    ]
    rows = given if lie_alike(given) else alike(given)
    params, exp_avgs, exp_avg_sqs, masters, averages, grads = rows
    adamw_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        states.steps,
        masters,
        averages,
        states.average_counts,
        settings,
        scale,
        maximize,
        swa,
        skip_nonfinite,
        backend,
    )
    if rows is not given:
        _write_back(given[:-1], rows[:-1])


@torch.no_grad()
def apply_norm(grads: list[Tensor], backend: str | None) -> Tensor:
    """See ``gradient_norm``: check, lay alike, run."""
    if not grads:
        raise KernelInputError("gradient_norm takes at least one tensor, found none")
    _check_list("grads", grads, grads[0].device, DTYPES)
    if not lie_alike([grads]):
        grads = alike([grads])[0]
    return gradient_norm(grads, backend)


def check(states: States, settings: Tensor) -> None:
    """Raise ``KernelInputError`` unless lists, shapes, dtypes and devices fit together."""
    param_dtype, device = states.params[0].dtype, states.params[0].device
    computed = sum_dtype(param_dtype)
    allowed: dict[str, tuple[torch.dtype, ...]] = {
        "params": DTYPES,
        "grads": DTYPES,
        "exp_avgs": (param_dtype, computed),
        "exp_avg_sqs": tuple(each.dtype for each in states.exp_avgs[:1]),
        "steps": (torch.float32,),
        "masters": (computed,),
        "averages": (computed,),
        "average_counts": (torch.float32,),
    }
    lists = {field.name: getattr(states, field.name) for field in fields(states)}
    for name, tensors in lists.items():
        _check_length(name, len(tensors), len(states.params))
        _check_list(name, tensors, device, allowed[name])
        _check_shapes(name, tensors, states.params)
    if len(states.averages) != len(states.average_counts):
        raise KernelInputError(
            "adamw_step takes an average_count for each average, found "
            f"{len(states.averages)} averages and {len(states.average_counts)} average_counts"
        )
    if settings.shape != (6,) or settings.dtype != torch.float64 or settings.device != device:
        raise KernelInputError(
            f"adamw_step takes settings of adamw_settings, float64 (6,) on {device}, found "
            f"{settings.dtype} {tuple(settings.shape)} on {settings.device}"
        )


def _check_length(name: str, found: int, wanted: int) -> None:
    optional = name in ("masters", "averages", "average_counts")
    if found != wanted and (found or not optional):
        raise KernelInputError(
            f"adamw_step takes a tensor of {name} for each of {wanted} params, found {found}"
        )


def _check_list(
    name: str, tensors: list[Tensor], device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    if not tensors:
        return
    dtype = tensors[0].dtype
    if dtype not in dtypes:
        legal = " or ".join(str(each) for each in dict.fromkeys(dtypes))
        raise KernelInputError(f"{name} has to be of {legal}, found {dtype}")
    # Hundreds of tensors are looked at in each step: in few words, so that no GPU waits for it.
    dtypes_found = {each.dtype for each in tensors}
    devices_found = {each.device for each in tensors}
    if len(dtypes_found) > 1 or devices_found != {device}:
        found = ", ".join(sorted({f"{each.dtype} on {each.device}" for each in tensors}))
        raise KernelInputError(
            f"{name} has to be of one dtype on the device of all, {device}, found {found}"
        )
    if {each.layout for each in tensors} != {torch.strided}:
        raise KernelInputError(f"{name} has to be of {torch.strided}, found a sparse tensor")


def _check_shapes(name: str, tensors: list[Tensor], params: list[Tensor]) -> None:
    found = [each.shape for each in tensors]
    wanted = [each.shape for each in params[: len(found)]]
    if name in ("steps", "average_counts"):
        wanted = [torch.Size()] * len(found)
    if found != wanted:
        index = next(i for i, shape in enumerate(found) if shape != wanted[i])
        raise KernelInputError(
            f"{name}[{index}] has to be of shape {tuple(wanted[index])}, found "
            f"{tuple(found[index])}"
        )


def _write_back(given: Rows, rows: Rows) -> None:
    for originals, copies in zip(given, rows, strict=True):
        for original, copy in zip(originals, copies, strict=True):
            if copy is not original:
                original.copy_(copy)
