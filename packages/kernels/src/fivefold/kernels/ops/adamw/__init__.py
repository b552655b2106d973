"""AdamW on many tensors in one pass over memory, with what else a training step does to weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fivefold.kernels.ops.adamw import op

__all__ = ["adamw_settings", "adamw_step", "gradient_norm"]


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    settings: Tensor,
    *,
    masters: Sequence[Tensor] = (),
    averages: Sequence[Tensor] = (),
    average_counts: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    maximize: bool = False,
    swa: bool = False,
    skip_nonfinite: bool = False,
    backend: str | None = None,
) -> None:
    """One step of AdamW in place, as ``torch.optim.AdamW`` makes it.

    Each gradient is read once, each other value read and written once, however much is asked for.
    Computes in float32, or float64 for float64 parameters, and rounds where it stores. Loshchilov
    and Hutter, arXiv 1711.05101.

    Every list has one dtype, all tensors are on one device, and those at one place of the lists
    have one shape. Where they do not also share strides without gaps, copies are made.

    Args:
        params: parameters of any floating-point dtype of at least 16 bits.
        grads: gradients, of any such dtype.
        exp_avgs: first moments, in the dtype of ``params`` or what is computed in.
        exp_avg_sqs: second moments, in the dtype of ``exp_avgs``.
        steps: how many steps each parameter has had, float32 of shape (); counted up.
        settings: of ``adamw_settings``.
        masters: the parameters in the dtype that is computed in: what is updated, and then rounded
            to ``params``.
        averages: running averages of the parameters (of masters where there are any) in the dtype
            that is computed in. The first step copies.
        average_counts: how many values each average has had, float32 of shape (); counted up.
        scale: () by which gradients are multiplied, as for clipping.
        maximize: go up the gradient.
        swa: averages weigh every step alike; the default is exponential, by ``average_decay``.
        skip_nonfinite: change nothing where ``scale`` is infinite or NaN.
        backend: the default is the best there is.

    Raises:
        KernelInputError: lists, shapes, dtypes or devices do not fit together.

    >>> weight, gradient, first, second, step = torch.ones(2), torch.ones(2), *torch.zeros(3, 2)
    >>> step = torch.tensor(0.0)
    >>> adamw_step([weight], [gradient], [first], [second], [step], adamw_settings(lr=0.5))
    >>> weight
    tensor([0.4950, 0.4950])
    """
    states = op.States(
        params=list(params),
        grads=list(grads),
        exp_avgs=list(exp_avgs),
        exp_avg_sqs=list(exp_avg_sqs),
        steps=list(steps),
        masters=list(masters),
        averages=list(averages),
        average_counts=list(average_counts),
    )
    op.apply(states, settings, scale, maximize, swa, skip_nonfinite, backend)


def adamw_settings(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    average_decay: float = 0.999,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Numbers of ``adamw_step`` in the order that it takes them, float64 (6,).

    They are a tensor so that a schedule can change them without a word to the host.

    Args:
        lr: the learning rate.
        betas: of the first and of the second moment, below 1.
        eps: added to the root of the second moment.
        weight_decay: shrinks parameters by ``lr * weight_decay`` of themselves.
        average_decay: what an exponential average keeps of itself in a step.
        device: of the parameters.
    """
    values = [lr, *betas, eps, weight_decay, average_decay]
    return torch.tensor(values, dtype=torch.float64, device=device)


def gradient_norm(grads: Sequence[Tensor], backend: str | None = None) -> Tensor:
    """The Euclidean norm of all values of some tensors together.

    Squares are summed in float32 (float64 for float64 tensors), always in the same order.

    Args:
        grads: of one floating-point dtype on one device; at least one.
        backend: the default is the best there is.

    Returns:
        () in the dtype that is computed in.

    Raises:
        KernelInputError: no tensor, or several dtypes or devices.

    >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
    tensor(5.)
    """
    return op.apply_norm(list(grads), backend)
