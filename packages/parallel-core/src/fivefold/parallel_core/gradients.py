"""What happens to gradients between backward and the optimizer: sums, global norm, clipping.

The sum over the data axes is FSDP's; what is left is the axes on which a replicated parameter saw
only a part of the tokens (the norms and the router under sequence parallelism).
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.parameters import ParameterTable, Piece
from fivefold.parallel_core.topology import Axis, Topology


def sum_partial(pieces: list[Piece], topology: Topology) -> None:
    """Sum every gradient over the axes on which the table calls it partial, in place.

    One all-reduce for each axis and dtype, however many parameters there are.
    """
    batches: dict[tuple[str, torch.dtype], list[Tensor]] = defaultdict(list)
    for piece in pieces:
        for axis in piece.placement.partial:
            if topology.size(axis) > 1 and piece.parameter.requires_grad and piece.local.numel():
                grad = _gradient_of(piece)
                batches[axis, grad.dtype].append(grad)
    for (name, _), grads in batches.items():
        _sum_together(grads, topology.axis(name))


@torch.no_grad()
def sum_parts(gradients: Mapping[str, Tensor], table: ParameterTable) -> dict[str, Tensor]:
    """Gradients of one sample, summed over the axes on which the table calls them partial.

    For steps that look at each sample's gradient by itself; ``sum_partial`` must not follow.

    Args:
        gradients: by the table's names, the same on all ranks; those of 16 bits are summed, and
            come back, in float32.
        table: of the model.
    """
    found = dict(gradients)
    batches: dict[tuple[str, torch.dtype], list[Tensor]] = defaultdict(list)
    for name in gradients:
        axes = [axis for axis in table[name].partial if table.topology.size(axis) > 1]
        for axis in axes:
            wide = torch.promote_types(found[name].dtype, torch.float32)
            found[name] = found[name].to(wide)
            batches[axis, wide].append(found[name])
    for (axis, _), grads in batches.items():
        _sum_together(grads, table.topology.axis(axis))
    return found


def _gradient_of(piece: Piece) -> Tensor:
    """The local gradient; zeros where backward left none, since the other ranks may have some."""
    if piece.parameter.grad is None:
        piece.parameter.grad = torch.zeros_like(piece.parameter)
    grad = piece.grad
    if grad is None:
        raise RuntimeError(f"the gradient of {piece.name} could not be set")
    return grad


def _sum_together(grads: list[Tensor], axis: Axis) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    with labelled(axis.name):
        dist.all_reduce(flat, group=axis.group)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def global_norm(pieces: list[Piece], topology: Topology) -> Tensor:
    """The 2-norm of the gradient of the whole model, each element counted once.

    Returns:
        A float64 scalar, the same on every rank.
    """
    total = torch.zeros((), dtype=torch.float64, device=topology.device)
    for piece in pieces:
        if piece.counted and piece.grad is not None:
            total += torch.linalg.vector_norm(piece.grad).double().square()
    if topology.world.group is not None:
        with labelled("world"):
            dist.all_reduce(total, group=topology.world.group)
    return total.sqrt()


def clip(pieces: list[Piece], norm: Tensor, limit: float) -> None:
    """Scale every gradient by min(1, limit / norm), in place."""
    factor = min(1.0, limit / max(float(norm), 1e-30))
    grads = [piece.grad for piece in pieces if piece.grad is not None]
    if factor < 1.0 and grads:
        torch._foreach_mul_(grads, factor)
