"""The specification of ``adamw_step`` and ``gradient_norm`` in torch's foreach functions.

It asks tensors for their numbers, so on a GPU the host waits for the device.

Legend: w weights, g gradients, m and v their first and second moments.
"""

import math

import torch
from torch import Tensor

from fivefold.kernels.operands import widened


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
    factor = 1.0 if scale is None else float(scale)
    if skip_nonfinite and not math.isfinite(factor):
        return
    lr, beta1, beta2, eps, weight_decay, average_decay = settings.tolist()
    torch._foreach_add_(steps, 1)
    g = torch._foreach_mul(_wide(grads), -factor if maximize else factor)
    w, m, v = _wide(masters or params), _wide(exp_avgs), _wide(exp_avg_sqs)

    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    counts = [float(step) for step in steps]
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**count) for count in counts])
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(w, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(w, m, denominators, [-lr / (1 - beta1**count) for count in counts])

    for stored, computed in ((exp_avgs, m), (exp_avg_sqs, v), (masters or params, w)):
        _store(stored, computed)
    if masters:
        _store(params, masters)
    if averages:
        torch._foreach_add_(average_counts, 1)
        _average(averages, _wide(masters or params), average_counts, average_decay, swa)


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """See the public function."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(_wide(grads))))


def _average(
    averages: list[Tensor], values: list[Tensor], counts: list[Tensor], decay: float, swa: bool
) -> None:
    for average, value, count in zip(averages, values, map(float, counts), strict=True):
        if swa or count == 1:
            average.mul_(1 - 1 / count).add_(value, alpha=1 / count)
        else:
            average.mul_(decay).add_(value, alpha=1 - decay)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """In the dtype that is computed in: the same tensors where they are of it."""
    return [widened(each) for each in tensors]


def _store(stored: list[Tensor], computed: list[Tensor]) -> None:
    if stored[0] is not computed[0]:
        torch._foreach_copy_(stored, computed)
