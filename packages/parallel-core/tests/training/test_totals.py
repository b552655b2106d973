"""Totals over ranks: names that only some hold, exact sums, and names that come too late."""

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.errors import ParallelError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.totals import Totals

BIG = 2**24 + 1
"""The first integer that float32 has not."""


def test_one_process_gets_its_own_values_in_float64() -> None:
    totals = Totals(Topology.local().world)
    given = {"count": torch.tensor(BIG), "load": torch.tensor([[1.5, 2.0], [0.0, -1.0]])}
    sums = totals.sum(given)
    assert {name: value.dtype for name, value in sums.items()} == {
        "count": torch.float64,
        "load": torch.float64,
    }
    assert sums["count"].item() == BIG
    assert torch.equal(sums["load"], given["load"].double())


def test_nothing_is_carried_from_call_to_call() -> None:
    totals = Totals(Topology.local().world)
    for value in (3.0, 4.0):
        assert totals.sum({"loss": torch.tensor(value)})["loss"].item() == value


def test_a_name_of_the_first_call_that_is_missing_later_counts_as_zero() -> None:
    totals = Totals(Topology.local().world)
    totals.sum({"loss": torch.tensor(1.0), "load": torch.ones(2, 3)})
    sums = totals.sum({"loss": torch.tensor(2.0)})
    assert sums["loss"].item() == 2.0
    assert torch.equal(sums["load"], torch.zeros(2, 3, dtype=torch.float64))


def test_a_new_name_after_the_first_call_is_refused_and_named() -> None:
    totals = Totals(Topology.local().world)
    totals.sum({"loss": torch.tensor(1.0)})
    with pytest.raises(ParallelError, match=r"totals late, later are new; .* had loss"):
        totals.sum({name: torch.tensor(1.0) for name in ("loss", "later", "late")})


def sums_on_a_rank() -> list[dict[str, Tensor]]:
    """Two calls; each rank has a vector of its own name, and one that both have."""
    world = Topology(Layout(2)).world
    totals = Totals(world)
    first = totals.sum(
        {
            "loss": torch.tensor(float(2**24) if world.rank == 0 else 1.0),
            f"load.{world.rank}": torch.tensor([1, 2, 3]) * (world.rank + 1),
        }
    )
    # The second rank's dictionary is empty: it still takes part.
    second = totals.sum({"loss": torch.tensor(0.25)} if world.rank == 0 else {})
    return [first, second]


def test_ranks_with_different_names_get_the_same_sums() -> None:
    results = launch(sums_on_a_rank, 2, timeout=60)
    for first, second in results:
        assert set(first) == set(second) == {"loss", "load.0", "load.1"}
        assert first["loss"].item() == BIG, "added in float64"
        assert first["load.0"].tolist() == [1.0, 2.0, 3.0]
        assert first["load.1"].tolist() == [2.0, 4.0, 6.0]
        assert second["loss"].item() == 0.25
        assert second["load.0"].tolist() == second["load.1"].tolist() == [0.0, 0.0, 0.0]
