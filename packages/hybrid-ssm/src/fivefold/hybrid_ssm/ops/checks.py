"""What the public functions of several ops check alike."""

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError
from fivefold.kernels.derivatives import in_transform

Wanted = tuple[tuple[str, Tensor | None, tuple[int, ...]], ...]


def check_shapes(name: str, x: Tensor, wanted: Wanted) -> None:
    """Raise ``HybridInputError`` unless each tensor has its shape and is where ``x`` is.

    Args:
        name: of the op.
        x: its main tensor.
        wanted: name, tensor or None, and shape of the others.
    """
    for label, tensor, shape in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise HybridInputError(
                f"{name} of x {tuple(x.shape)} takes {label} of shape {shape}, found "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise HybridInputError(
                f"{name} takes tensors of one device, found x on {x.device} and {label} on "
                f"{tensor.device}"
            )


def check_limits(name: str, dt_limit: tuple[float, float]) -> None:
    """Raise ``HybridInputError`` unless the least is no more than the greatest step size."""
    if not dt_limit[0] <= dt_limit[1]:
        raise HybridInputError(f"{name} takes a dt_limit (least, greatest), found {dt_limit}")


def check_ids(name: str, seq_ids: Tensor | None) -> None:
    """Raise ``HybridInputError`` unless ids are integers."""
    if seq_ids is not None and (seq_ids.is_floating_point() or seq_ids.is_complex()):
        raise HybridInputError(f"{name} takes seq_ids of integers, found {seq_ids.dtype}")


def check_no_gradient(name: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise ``HybridInputError`` where autograd would miss what an op writes in place."""
    if wants_gradient(*tensors):
        raise HybridInputError(
            f"{name} writes in place and has no gradient, and a tensor requires one: use "
            f"torch.no_grad(), or {instead}, which has gradients"
        )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for the gradient of one of them."""
    if not torch.is_grad_enabled():
        return False
    # The compiler traces within a transform of its own, which wants nothing.
    if not torch.compiler.is_compiling() and in_transform():
        return True
    return any(x is not None and x.requires_grad for x in tensors)
