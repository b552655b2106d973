"""A dim in equal pieces, one for each rank of an axis; nothing is sent."""

from torch import Tensor

from fivefold.parallel_core.topology import Axis


def piece_size(length: int, axis: Axis) -> int:
    """``length`` divided by the ranks of ``axis``.

    Raises:
        ValueError: it does not divide.
    """
    if length % axis.size:
        raise ValueError(
            f"a dim of {length} cannot be split over {axis.name} of {axis.size} ranks; it must be "
            f"a multiple of {axis.size}"
        )
    return length // axis.size


def piece_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's piece of ``x`` along ``dim``; nothing is sent."""
    size = piece_size(x.shape[dim], axis)
    return x.narrow(dim, axis.rank * size, size)
