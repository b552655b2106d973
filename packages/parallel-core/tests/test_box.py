"""Boxes against the sets of indices that they stand for."""

from itertools import product
from math import prod

import pytest
import torch

from fivefold.parallel_core.box import Box

Index = tuple[int, ...]


def indices(box: Box) -> set[Index]:
    """Every index in a box."""
    return set(product(*(range(o, o + n) for o, n in zip(box.offset, box.size, strict=True))))


def small_boxes() -> list[Box]:
    """All boxes of one and of two dims inside a tensor of edge 3."""
    edges = [(o, n) for o in range(3) for n in range(4 - o)]
    lines = [Box((o,), (n,)) for o, n in edges]
    return lines + [Box((o, p), (n, m)) for (o, n), (p, m) in product(edges, repeat=2)]


BOXES = small_boxes()


def test_the_whole_box_covers_the_shape() -> None:
    assert Box.whole((3, 2)) == Box((0, 0), (3, 2))
    assert len(indices(Box.whole((3, 2)))) == 6
    assert Box.whole(()).numel == 1


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_numel_and_slices_are_those_of_the_indices(box: Box) -> None:
    marked = torch.zeros((4,) * len(box.size))
    marked[box.slices] = 1
    assert box.numel == len(indices(box)) == int(marked.sum())
    assert {tuple(i) for i in marked.nonzero().tolist()} == indices(box)


def test_the_intersection_holds_the_common_indices() -> None:
    for a, b in product(BOXES, repeat=2):
        if len(a.size) == len(b.size):
            common = a.intersect(b)
            assert indices(common) == indices(a) & indices(b), (a, b)
            assert min(common.size) >= 0
            assert common.numel == prod(common.size) == b.intersect(a).numel


def test_within_moves_the_corner_and_keeps_the_size() -> None:
    assert Box((5, 7), (2, 3)).within(Box((4, 7), (9, 9))) == Box((1, 0), (2, 3))
    inner, outer = Box((5,), (2,)), Box((4,), (4,))
    values = torch.arange(10)
    assert values[outer.slices][inner.within(outer).slices].tolist() == [5, 6]


def test_boxes_of_different_rank_do_not_meet() -> None:
    with pytest.raises(ValueError, match="zip"):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))
