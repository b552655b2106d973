"""``adamw_step`` and ``gradient_norm`` in C++, see cpu.cpp: each value comes from memory once."""

from pathlib import Path

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.operands import sum_dtype
from fivefold.kernels.ops.adamw import tables

SOURCE = Path(__file__).with_suffix(".cpp")


def refuses(name: str, *inputs: object) -> str | None:
    """Machines where the file cannot be compiled."""
    return native.refusal(SOURCE)


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
) -> None:
    """See the public function."""
    valued = [params, grads, exp_avgs, exp_avg_sqs, masters, averages]
    native.call(
        native.load(SOURCE).adamw_step,
        tables.table(tables.addresses([*valued, steps, average_counts]), params[0].device),
        tables.table((tables.sizes(params),), params[0].device),
        len(params),
        native.TYPES[params[0].dtype],
        native.TYPES[grads[0].dtype],
        native.TYPES[exp_avgs[0].dtype],
        bool(masters),
        bool(averages),
        settings,
        None if scale is None else scale.to(torch.float64),
        maximize,
        swa,
        skip_nonfinite,
        torch.get_num_threads(),
    )


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """See the public function."""
    norm = torch.empty((), dtype=torch.float64)
    native.call(
        native.load(SOURCE).gradient_norm,
        tables.table(tables.addresses([grads]), grads[0].device),
        tables.table((tables.sizes(grads),), grads[0].device),
        len(grads),
        native.TYPES[grads[0].dtype],
        norm,
        torch.get_num_threads(),
    )
    return norm.to(sum_dtype(grads[0].dtype))
