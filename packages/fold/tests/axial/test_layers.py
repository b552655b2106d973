"""Layers on some rows give the rows that they give on all, also so many rows at a time."""

import pytest
import torch
from axial_job import network
from torch import Tensor

from fivefold.fold.axial.layers import (
    COLUMNS,
    ROWS,
    attend,
    multiply,
    pair_up,
    share,
    to_columns,
    to_rows,
)
from fivefold.fold.model.msa import OuterProductMean
from fivefold.fold.model.pair import TriangleAttentionStartingNode, TriangleMultiplication
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.shares import share_along
from fivefold.parallel_core.topology import Topology

STACK, C, S, N, RANKS = network().evoformer, 6, 5, 7, 3
CHUNKS = (None, 2)


def _filled(layer: torch.nn.Module) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=draw)
    return layer.double()


@torch.no_grad()
def _pairs_of_values() -> list[tuple[Tensor, Tensor]]:
    """What each layer gives on this rank's rows, and these rows of what it gives on all."""
    axis = Topology(Layout(RANKS, tp=RANKS)).axis("tp")
    draw = torch.Generator().manual_seed(0)
    z, m = (torch.randn(2, rows, N, C, generator=draw).double() for rows in (N, S))
    masks = [(torch.rand(2, rows, N, generator=draw) > 0.3).double() for rows in (N, S)]
    z_mask, m_mask = masks
    rows = share_along(z, axis, ROWS)
    found = []
    for chunk_size in CHUNKS:
        for outgoing in (True, False):
            layer = _filled(TriangleMultiplication(C, STACK.c_triangle, outgoing=outgoing))
            update = multiply(layer, rows, z_mask, axis, chunk_size)
            found.append((update, share_along(layer(z, z_mask), axis, ROWS)))
        node = _filled(TriangleAttentionStartingNode(C, STACK.num_pair_heads, 4))
        keys = z_mask > 0
        update = attend(node, rows, share(keys, axis, ROWS), axis, chunk_size)
        found.append((update, share_along(node(z, keys), axis, ROWS)))
        outer = _filled(OuterProductMean(C, C, STACK.c_outer))
        update = pair_up(outer, share_along(m, axis, COLUMNS), m_mask, axis)(chunk_size)
        found.append((update, share_along(outer(m, m_mask), axis, ROWS)))
    columns = to_columns(rows, axis, N)()
    found.append((columns, share_along(z, axis, COLUMNS)))
    found.append((to_rows(columns, axis, N)(), rows))
    return found


@pytest.fixture(scope="module")
def found() -> list[list[tuple[Tensor, Tensor]]]:
    return launch(_pairs_of_values, RANKS, timeout=120)


@pytest.mark.parametrize("rank", range(RANKS))
def test_rows_are_those_of_the_whole(found: list[list[tuple[Tensor, Tensor]]], rank: int) -> None:
    assert len(found[rank]) == 4 * len(CHUNKS) + 2
    for part, expected in found[rank]:
        assert part.numel() > 0
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_no_mask_stays_none() -> None:
    assert share(None, Topology.local().axis("tp"), ROWS) is None
