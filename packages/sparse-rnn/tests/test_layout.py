"""The simulator of banks against cases by hand, and what reordering and permuting achieve."""

import pytest
import torch

from fivefold.sparse_rnn import SparseRNNInputError, layout, pattern


def _random(rows: int, cols: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    return pattern.from_mask(torch.rand(rows, cols) < density)


def _one_row(columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0, len(columns)], dtype=torch.int32), torch.tensor(columns)


@pytest.mark.parametrize(
    ("columns", "element_bytes", "expected"),
    [
        ([5] * 32, 4, 1),  # one address is broadcast
        (list(range(32)), 4, 1),
        ([32 * i for i in range(32)], 4, 32),  # one bank
        ([2 * i for i in range(32)], 4, 2),
        (list(range(32)), 8, 2),  # two phases of 16 lanes
        (list(range(32)), 16, 4),
        ([8 * i for i in range(8)], 16, 8),
        ([0, 8, 1, 9], 16, 2),
        ([], 16, 0),
    ],
)
def test_waves_by_hand(columns: list[int], element_bytes: int, expected: int) -> None:
    crow, col = _one_row(columns)
    place = layout.in_order(crow)
    assert int(layout.waves(crow, col, place, element_bytes)) == expected


@pytest.mark.parametrize("element_bytes", [4, 8, 16])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_every_nonzero_has_a_lane_of_its_own(element_bytes: int, density: float) -> None:
    crow, col = _random(67, 203, density)
    place = layout.reorder(crow, col, element_bytes)
    row = layout._rows(crow)
    assert bool((place >= 0).all())
    assert bool((place < 32 * layout.num_slots(crow)[row]).all())
    assert torch.unique(torch.stack([row, place]), dim=1).shape[1] == col.shape[0]


def test_no_row_takes_fewer_waves_than_its_fullest_bank_or_more_than_before() -> None:
    crow, col = _random(300, 500, 0.15)
    found = layout.waves(crow, col, layout.reorder(crow, col, 16), 16)
    row = layout._rows(crow)
    fullest = torch.bincount(row * 8 + col.long() % 8, minlength=2400).view(300, 8).amax(1)
    assert bool((found >= fullest).all())
    assert float(found.sum() / fullest.sum()) < 1.02
    assert bool((found <= layout.waves(crow, col, layout.in_order(crow), 16)).all())


@pytest.mark.parametrize(
    ("hidden", "density", "ceiling"), [(2304, 0.3, 1.25), (2304, 0.1, 1.40), (1024, 0.1, 1.55)]
)
def test_reordering_stays_under_its_ceiling(hidden: int, density: float, ceiling: float) -> None:
    crow, col = _random(512, hidden, density)
    before = layout.ratio(crow, col, layout.in_order(crow), 16)
    after = layout.ratio(crow, col, layout.reorder(crow, col, 16), 16)
    assert after <= ceiling < before


@pytest.mark.parametrize(("rows", "hidden", "passes"), [(256, 256, 40), (512, 1024, 8)])
def test_a_permutation_of_units_makes_it_less(rows: int, hidden: int, passes: int) -> None:
    crow, col = _random(rows, hidden, 0.1)
    order = layout.permute_units(crow, col, hidden, 16, num_passes=passes)
    assert torch.equal(order.sort().values, torch.arange(hidden))
    position = torch.empty_like(order)
    position[order] = torch.arange(hidden)
    moved = position[col.long()]
    before = layout.ratio(crow, col, layout.reorder(crow, col, 16), 16)
    after = layout.ratio(crow, moved, layout.reorder(crow, moved, 16), 16)
    assert after < before - 0.02


@pytest.mark.parametrize(("hidden", "each"), [(1024, 3), (2304, 4), (256, 10)])
@pytest.mark.parametrize("element_bytes", [4, 16])
def test_rows_balanced_by_blocks_have_no_conflicts_where_a_block_is_a_bank(
    hidden: int, each: int, element_bytes: int
) -> None:
    mask = torch.rand(40, hidden // 32, 32).argsort(-1) < each
    crow, col = pattern.from_mask(mask.view(40, hidden))
    order = layout.place_blocks(hidden, element_bytes)
    assert torch.equal(order.sort().values, torch.arange(hidden))
    position = torch.empty_like(order)
    position[order] = torch.arange(hidden)
    moved = position[col.long()]
    even = hidden % (32 * layout.num_banks(element_bytes)) == 0
    assert torch.equal(order, torch.arange(hidden)) != even
    if even:
        found = layout.ratio(crow, moved, layout.reorder(crow, moved, element_bytes), element_bytes)
        assert found == 1.0
        assert bool(
            (
                layout.fullest(crow, moved, element_bytes) * layout.num_banks(element_bytes)
                == crow.diff()
            ).all()
        )


def test_balanced_banks_have_no_conflicts() -> None:
    # Four of each 32 columns, one in each bank of 8.
    chosen = torch.randint(4, (64, 16, 8)) * 8 + torch.arange(8)
    col = (chosen + 32 * torch.arange(16)[None, :, None]).reshape(-1)
    crow = torch.arange(65, dtype=torch.int32) * 128
    assert layout.ratio(crow, col, layout.reorder(crow, col, 16), 16) == 1.0


def test_dealing_is_nearly_even_and_complete() -> None:
    costs = torch.randint(1, 60, (97,)).tolist()
    parts = layout.deal(costs, 8)
    assert sorted(item for part in parts for item in part) == list(range(97))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) <= 4 / 3 * max(sum(costs) / 8, max(costs))


def test_other_widths_are_refused() -> None:
    with pytest.raises(SparseRNNInputError, match="4, 8 or 16 bytes at once, found 12"):
        layout.num_banks(12)
