"""Equal pieces of a dim."""

import pytest
import torch

from fivefold.parallel_core.even import piece_along, piece_size
from fivefold.parallel_core.topology import Axis


def test_pieces_are_equal_or_refused_with_the_numbers() -> None:
    axis = Axis("cp", 4, 2, (0, 1, 2, 3))
    assert piece_size(12, axis) == 3
    x = torch.arange(24).view(2, 12)
    assert piece_along(x, axis, 1).tolist() == x[:, 6:9].tolist()
    with pytest.raises(ValueError, match=r"dim of 10 cannot be split over cp of 4 ranks.*of 4"):
        piece_size(10, axis)
