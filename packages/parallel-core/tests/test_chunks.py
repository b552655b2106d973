"""Cutting a tensor over ranks: the dim, the boxes, the padding."""

import pytest
import torch

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.chunks import Chunks, dim_to_cut


@pytest.mark.parametrize(
    ("shape", "count", "dim"),
    [((8, 3), 4, 0), ((6, 8), 4, 1), ((6, 10), 4, 0), ((0, 8), 4, 1), ((5,), 4, 0), ((), 4, 0)],
)
def test_the_first_dim_that_divides_is_cut(shape: tuple[int, ...], count: int, dim: int) -> None:
    assert dim_to_cut(shape, count) == dim


@pytest.mark.parametrize(
    ("shape", "count"), [((8, 3), 4), ((6, 8), 4), ((6, 10), 4), ((5,), 4), ((2,), 8), ((7, 2), 1)]
)
def test_boxes_tile_the_tensor_in_order_and_are_torchs_chunks(
    shape: tuple[int, ...], count: int
) -> None:
    chunks = Chunks(shape, count)
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [values[chunks.box(i).slices] for i in range(count)]
    wanted = values.chunk(count, chunks.dim)
    assert torch.equal(torch.cat(parts, chunks.dim), values)
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=False))
    assert all(part.numel() == 0 for part in parts[len(wanted) :])
    assert max(part.numel() for part in parts) == chunks.padded


def test_where_nothing_divides_the_last_ranks_have_less_or_nothing() -> None:
    chunks = Chunks((5, 3), 4)
    sizes = [chunks.box(i).size[0] for i in range(4)]
    assert (sizes, chunks.padded) == ([2, 2, 1, 0], 6)
    assert chunks.box(3) == Box((5, 0), (0, 3))
