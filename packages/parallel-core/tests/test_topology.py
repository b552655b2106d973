"""Groups at run time, in one job of 8 ranks that goes through many layouts."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout, LayoutError
from fivefold.parallel_core.topology import AXES, Topology

from .imagined import imagined

DEGREES = [
    {},
    {"tp": 2, "cp": 2, "pp": 2},
    {"tp": 2, "cp": 2, "ep": 4},
    {"tp": 2, "cp": 2, "ep": 2, "etp": 2, "pp": 2},
    {"ep": 8},
    {"pp": 8},
    {"tp": 4, "pp": 2, "etp": 2, "ep": 2},
    {"tp": 2, "etp": 2, "pp": 2, "order": "tp-pp-cp-ep-dp"},
]


@dataclass
class Seen:
    """What one rank found in one layout."""

    ranks: dict[str, tuple[int, ...]]
    indices: dict[str, int]
    group_ranks: dict[str, list[int] | None]
    group_ids: dict[str, int | None]
    sums: dict[str, float]
    num_new_groups: int
    meshes_share: bool


def look(degrees: dict[str, int]) -> Seen:
    layout = Layout(8, **degrees)
    before = len(dist.distributed_c10d._world.pg_names)
    topology = Topology(layout)
    num_new_groups = len(dist.distributed_c10d._world.pg_names) - before
    axes = {name: topology.axis(name) for name in AXES}
    # The last ranks ask for a mesh that the first do not: later groups must not notice.
    if topology.world_rank > 4:
        topology.mesh(next((name for name, axis in axes.items() if axis.size == 1), "tp"))
    sums = {}
    for name, axis in axes.items():
        total = torch.tensor([float(topology.world_rank)])
        if axis.group is not None:
            dist.all_reduce(total, group=axis.group)
        sums[name] = total.item()
    return Seen(
        ranks={name: axis.ranks for name, axis in axes.items()},
        indices={name: axis.rank for name, axis in axes.items()},
        group_ranks={
            name: axis.group and dist.get_process_group_ranks(axis.group)
            for name, axis in axes.items()
        },
        group_ids={name: axis.group and id(axis.group) for name, axis in axes.items()},
        sums=sums,
        num_new_groups=num_new_groups,
        meshes_share=all(
            topology.mesh(name).get_group() is axis.group
            and topology.mesh(name) is topology.mesh(name)
            for name, axis in axes.items()
            if axis.group is not None
        ),
    )


@pytest.fixture(scope="module")
def job() -> list[list[Seen]]:
    """For every layout what each rank saw."""

    def run() -> list[Seen]:
        return [look(degrees) for degrees in DEGREES]

    return [list(seen) for seen in zip(*launch(run, 8, timeout=300), strict=True)]


@pytest.mark.parametrize("index", range(len(DEGREES)), ids=[str(d) for d in DEGREES])
class TestEveryLayout:
    def test_axes_are_the_layouts_and_their_groups_really_meet(
        self, job: list[list[Seen]], index: int
    ) -> None:
        layout = Layout(8, **DEGREES[index])
        for rank, seen in enumerate(job[index]):
            for name in AXES:
                members = layout.group_of(name, rank)
                assert seen.ranks[name] == members
                assert members[seen.indices[name]] == rank
                assert seen.sums[name] == sum(members), name
                wanted = list(members) if len(members) > 1 else None
                assert seen.group_ranks[name] == wanted, "no group where nothing is sent"

    def test_axes_with_equal_members_share_one_group(
        self, job: list[list[Seen]], index: int
    ) -> None:
        for seen in job[index]:
            by_members: dict[tuple[int, ...], set[int | None]] = {}
            for name in AXES:
                by_members.setdefault(seen.ranks[name], set()).add(seen.group_ids[name])
            assert all(len(ids) == 1 for ids in by_members.values()), by_members

    def test_groups_of_a_rank_are_few_and_their_number_is_the_same_everywhere(
        self, job: list[list[Seen]], index: int
    ) -> None:
        for seen in job[index]:
            members = {ranks for ranks in seen.ranks.values() if 1 < len(ranks) < 8}
            assert seen.num_new_groups == len(members) + 1  # and one of its own, for FSDP
        assert job[index][0].num_new_groups <= len(AXES) + 1
        assert len({seen.num_new_groups for seen in job[index]}) == 1

    def test_meshes_stand_on_the_same_groups(self, job: list[list[Seen]], index: int) -> None:
        assert all(seen.meshes_share for seen in job[index])


def test_both_views_share_the_pipeline_and_folded_axes(job: list[list[Seen]]) -> None:
    index = DEGREES.index({"tp": 2, "cp": 2, "ep": 4})
    for seen in job[index]:
        assert seen.group_ids["ep"] == seen.group_ids["tp-cp"] == seen.group_ids["etp-ep"]
        assert seen.group_ids["edp"] == seen.group_ids["dp"]


def test_all_ranks_use_the_group_of_the_world(job: list[list[Seen]]) -> None:
    assert job[DEGREES.index({"ep": 8})][0].num_new_groups == 1


@pytest.mark.parametrize("tp", [4, 2])
def test_factors_of_an_axis_are_neighbours_and_those_at_their_place(tp: int) -> None:
    for topology in imagined(8, tp=tp):
        whole = topology.axis("tp")
        neighbours, others = topology.axis("tp%2"), topology.axis("tp//2")
        assert (neighbours.size, others.size) == (2, tp // 2)
        assert neighbours.ranks == whole.ranks[whole.rank // 2 * 2 :][:2]
        assert others.ranks == whole.ranks[whole.rank % 2 :: 2]
        assert others.rank * 2 + neighbours.rank == whole.rank


def test_the_ends_of_a_pipeline() -> None:
    axes = [topology.axis("pp-ends") for topology in imagined(8, pp=4)]
    assert [axis.size for axis in axes] == [2, 2, 1, 1, 1, 1, 2, 2]
    assert [axes[rank].ranks for rank in (0, 1, 6, 7)] == [(0, 6), (1, 7)] * 2
    assert all(topology.axis("pp-ends").size == 1 for topology in imagined(2))


def meet_on_parts() -> list[float]:
    topology = Topology(Layout(8, tp=4, pp=2))
    sums = []
    for name in ("tp%2", "tp//2", "pp-ends"):
        total = torch.tensor([float(topology.world_rank)])
        dist.all_reduce(total, group=topology.group(name))
        sums.append(total.item())
    assert topology.group("pp-ends") is topology.group("pp"), "equal members, one group"
    return sums


def test_parts_of_axes_have_groups_that_really_meet() -> None:
    for rank, sums in enumerate(launch(meet_on_parts, 8, timeout=300)):
        pair = rank // 2 * 2
        assert sums == [2 * pair + 1, 2 * (rank // 4 * 4 + rank % 2) + 2, 2 * (rank % 4) + 4]


def test_a_factor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"axis 'tp%3': tp has 4 ranks; ask for a divisor"):
        imagined(4, tp=4)[0].axis("tp%3")


def test_a_job_of_another_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutError, match=r"for 4 ranks, but the job has 1; start the job with 4"):
        Topology(Layout(4))


def test_local_needs_no_process_group() -> None:
    topology = Topology.local()
    assert not dist.is_initialized()
    for name in AXES:
        axis = topology.axis(name)
        assert (axis.size, axis.rank, axis.ranks, axis.group) == (1, 0, (0,), None)
        assert (topology.size(name), topology.rank(name), topology.group(name)) == (1, 0, None)
    assert (topology.world.size, topology.world.group) == (1, None)


def test_an_unknown_axis_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(LayoutError, match=r"no axis 'tp-pp'.*there are tp, cp, dp"):
        Topology.local().axis("tp-pp")


def test_a_mesh_without_a_process_group_says_how_to_get_one() -> None:
    with pytest.raises(LayoutError, match=r"no process group.*launch\(\)"):
        Topology.local().mesh("dp-cp")
