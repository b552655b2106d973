"""Collectives over the links that their groups touch."""

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.planner.hardware import hardware
from fivefold.parallel_core.planner.links import Reach, reaches, seconds
from fivefold.parallel_core.planner.setup import Setup

MACHINE = replace(
    hardware("h100"),
    link_efficiency=1.0,
    network_efficiency=1.0,
    node_latency=0.0,
    network_latency=0.0,
)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 2, "cp": 2, "pp": 2, "ep": 4, "etp": 2},
        {"tp": 4, "pp": 4, "ep": 8},
        {"tp": 1, "cp": 8, "ep": 2, "etp": 4},
        {"tp": 8, "pp": 2, "ep": 4, "etp": 1},
    ],
)
def test_groups_are_the_layouts(sizes: dict[str, int]) -> None:
    """Ranks of a node are counted in the groups that ``Layout`` itself lists."""
    setup = Setup(world_size=64, length=1024, global_batch=64, **sizes)
    for axis, reach in reaches(setup, 8).items():
        groups = setup.layout.groups(axis)
        inside = {sum(rank // 8 == group[0] // 8 for rank in group) for group in groups}
        assert {reach.size} == {len(group) for group in groups}, axis
        assert {reach.inside} == inside, axis


def test_rings() -> None:
    size = 1e9
    inside = seconds(MACHINE, "all_gather", Reach(8, 8), 1, size)
    assert inside == size / MACHINE.node_bandwidth
    # Eight ranks of each node leave it by eight ports, two by two.
    wide = seconds(MACHINE, "all_gather", Reach(16, 8), 1, size)
    assert wide == size / min(MACHINE.node_bandwidth, 8 * MACHINE.network_bandwidth)
    assert seconds(MACHINE, "all_gather", Reach(4, 2), 1, size) == size / 100e9


def test_an_all_to_all_uses_both_links() -> None:
    size = 1e9  # to 15 others, of whom 7 are in the node
    found = seconds(MACHINE, "all_to_all", Reach(16, 8), 1, size)
    assert found == pytest.approx(size * 8 / 15 / MACHINE.network_bandwidth)
    assert seconds(MACHINE, "all_to_all", Reach(8, 8), 1, size) == size / MACHINE.node_bandwidth


def test_latency_counts_steps() -> None:
    slow = replace(MACHINE, node_latency=1e-6, network_latency=1e-5)
    assert seconds(slow, "all_reduce", Reach(8, 8), 3, 0) == pytest.approx(3 * 14e-6)
    assert seconds(slow, "all_gather", Reach(16, 8), 1, 0) == pytest.approx(14e-6 + 1e-5)
    assert seconds(slow, "send", Reach(2, 1), 5, 0) == pytest.approx(5e-5)


def test_alone_nothing_is_sent() -> None:
    assert seconds(MACHINE, "all_reduce", Reach(1, 1), 4, 1e9) == 0
