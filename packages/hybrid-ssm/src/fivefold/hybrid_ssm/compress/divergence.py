"""Forward KL of a student's logits from its teacher's, with the vocabulary on one rank or on many.

Legend: N tokens, V vocabulary of this rank.
"""

from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core.collectives import gather_along, sum_over
from fivefold.parallel_core.topology import Axis


class _ForwardKL(torch.autograd.Function):
    """T² times the sum over v of p(v) (log p(v) - log q(v)), of each token."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, axis: Axis | None, size: int
    ) -> Tensor:
        log_q = _log_softmax(student, temperature, axis, size)
        log_p = _log_softmax(teacher, temperature, axis, size)
        p_nv = log_p.exp()
        # Columns that pad the vocabulary are minus infinity in both.
        each_nv = torch.where(p_nv > 0, p_nv * (log_p - log_q), 0.0)
        ctx.save_for_backward(log_q.exp().sub_(p_nv).mul_(temperature))
        ctx.dtype = student.dtype
        total_n = each_nv.sum(-1) * temperature**2
        return total_n if axis is None else sum_over(total_n, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference_nv,) = ctx.saved_tensors
        return (difference_nv * grads[0].unsqueeze(1)).to(ctx.dtype), None, None, None, None


def _log_softmax(logits_nv: Tensor, temperature: float, axis: Axis | None, size: int) -> Tensor:
    wide = torch.promote_types(logits_nv.dtype, torch.float32)
    scaled = logits_nv.detach().to(wide) / temperature
    width = scaled.shape[1]
    first = 0 if axis is None else axis.rank * width
    if first + width > size:
        scaled[:, max(size - first, 0) :] = -torch.inf
    top_n = scaled.amax(-1)
    if axis is not None and axis.size > 1:
        top_n = gather_along(top_n.unsqueeze(0), axis, 0).amax(0)
    sum_n = (scaled - top_n.unsqueeze(1)).exp().sum(-1)
    if axis is not None:
        sum_n = sum_over(sum_n, axis)
    return scaled - (top_n + sum_n.log()).unsqueeze(1)


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    axis: Axis | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of each token, times the square of the temperature.

    That factor keeps the size of gradients as the temperature changes (arXiv 1503.02531, section
    2). The teacher gets no gradient.

    Args:
        student: logits (N, V).
        teacher: logits (N, V).
        temperature: by which both are divided.
        axis: the ranks that hold other columns; None where this one holds all.
        vocab_size: columns of all ranks that are no padding; None for all.

    Returns:
        (N,), the same on every rank, in float32 or wider.

    >>> forward_kl(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([0.])
    """
    columns = student.shape[1] * (1 if axis is None else axis.size)
    size = columns if vocab_size is None else vocab_size
    return _ForwardKL.apply(student, teacher, temperature, axis, size)
