"""Layers on the rows that a rank holds, with what they need of the other ranks' on its way.

What is gathered sets out before the rank computes what needs only its own rows, and is awaited
after that. Every rank starts and awaits in the same order.

Legend: any leading dims, S sequences, N residues, C channels; in brackets what a rank holds.
"""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from fivefold.fold.model.msa import OuterProductMean
from fivefold.fold.model.pair import TriangleAttentionStartingNode, TriangleMultiplication
from fivefold.parallel_core.shares import share_along, start_gather, start_switch
from fivefold.parallel_core.topology import Axis

ROWS, COLUMNS = -3, -2
"""Dims of the first and of the second residue, or of the sequence and the residue."""


def to_rows(x: Tensor, axis: Axis, num_columns: int) -> Callable[[], Tensor]:
    """Begin to share the rows of x (..., I, [J], C) instead of its columns."""
    return start_switch(x, axis, gather_dim=COLUMNS, split_dim=ROWS, length=num_columns)


def to_columns(x: Tensor, axis: Axis, num_rows: int) -> Callable[[], Tensor]:
    """Begin to share the columns of x (..., [I], J, C) instead of its rows."""
    return start_switch(x, axis, gather_dim=ROWS, split_dim=COLUMNS, length=num_rows)


def share(mask: Tensor | None, axis: Axis, dim: int) -> Tensor | None:
    """This rank's part of a mask (..., I, J), by the dims of what it masks."""
    return None if mask is None else share_along(mask, axis, dim + 1)


def multiply(
    layer: TriangleMultiplication, z: Tensor, mask: Tensor, axis: Axis, chunk_size: int | None
) -> Tensor:
    """The update of z (..., [N], N, C), of which the whole mask is (..., N, N).

    Outgoing edges of a row lie on its rank. Incoming edges are columns: one side of the product
    changes from rows to columns, instead of all of z there and back.
    """
    num_residues = mask.shape[-1]
    z, a_cik, b_cjk = layer.edges(z, share_along(mask, axis, -2))
    if layer.outgoing:
        b_later = start_gather(b_cjk, axis, -2, num_residues)
    else:
        # Of both sides a rank has all i and j, but of the k only its own rows.
        a_later = start_switch(a_cik, axis, gather_dim=-1, split_dim=-2, length=num_residues)
        b_later = start_gather(b_cjk, axis, -1, num_residues)
        a_cik = a_later()
    return layer.combine(z, a_cik, cache(b_later), chunk_size)


def attend(
    layer: TriangleAttentionStartingNode,
    z: Tensor,
    key_mask: Tensor | None,
    axis: Axis,
    chunk_size: int | None,
) -> Tensor:
    """The update of z (..., [N], N, C), with key_mask (..., [N], N), by edges of equal first end.

    For the ending node hand in and take out the transpose.
    """
    z = layer.layer_norm(z)
    bias = start_gather(layer.bias(z), axis, -2, z.shape[-2])
    return layer.attend(z, cache(bias), key_mask, chunk_size)


def pair_up(
    layer: OuterProductMean, m: Tensor, mask: Tensor, axis: Axis
) -> Callable[[int | None], Tensor]:
    """Begin the outer product mean of m (..., S, [N], C), of which the whole mask is (..., S, N).

    Returns:
        A function of a chunk size that gives the update (..., [N], N, C).
    """
    mine = share_along(mask, axis, -1)
    a_snc, b_snd = layer.sides(m, mine)
    b_later = start_gather(b_snd, axis, COLUMNS, mask.shape[-1])
    counts = mine.mT @ mask
    return lambda chunk_size: layer.combine(a_snc, b_later(), counts, chunk_size)
