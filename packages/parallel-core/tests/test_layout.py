"""Layout against Megatron-Core's groups (golden digests), against laws, and by example."""

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

from fivefold.parallel_core.layout import AXES, DEFAULT_ORDER, Layout, LayoutError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "layout.json").read_text(encoding="utf-8"))
PP_MIDDLE = "tp-cp-pp-ep-dp"
VIEWS = (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp"))


def all_degrees(world_size: int) -> Iterator[dict[str, int]]:
    """All degrees whose products divide the world, in the order of the golden file."""
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    for tp in divisors:
        for cp in divisors:
            for pp in (d for d in divisors if world_size % (tp * cp * d) == 0):
                for ep in divisors:
                    for etp in (d for d in divisors if world_size % (pp * ep * d) == 0):
                        yield {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}


def packed(layout: Layout) -> bytes:
    """A layout as tests/golden/make_layout_golden.py packs it."""
    degrees = (layout.tp, layout.cp, layout.pp, layout.ep, layout.etp)
    parts = [struct.pack("<5H", *degrees)]
    for token in GOLDEN["tokens"]:
        parts += [struct.pack(f"<{len(g) + 1}H", *g, 65535) for g in layout.groups(token)]
    return b"".join(parts)


def digest(world_size: int, order: str) -> dict[str, int | str]:
    sha, total, legal = hashlib.sha256(), 0, 0
    for degrees in all_degrees(world_size):
        total += 1
        try:
            layout = Layout(world_size, **degrees, order=order)
        except LayoutError:
            continue
        legal += 1
        sha.update(packed(layout))
    return {"total": total, "legal": legal, "sha256": sha.hexdigest()}


@pytest.mark.parametrize("order", [DEFAULT_ORDER, PP_MIDDLE])
@pytest.mark.parametrize("world_size", range(1, 65))
def test_all_groups_of_all_layouts_equal_megatron_core(world_size: int, order: str) -> None:
    assert digest(world_size, order) == GOLDEN["worlds"][order][str(world_size)]


def test_all_orders_of_8_ranks_equal_megatron_core() -> None:
    golden = GOLDEN["every_order_of_8"]
    assert len(golden) == 120
    assert {order: digest(8, order) for order in golden} == golden


@pytest.mark.parametrize("case", GOLDEN["large"], ids=lambda c: f"{c['world_size']}-{c['order']}")
def test_large_worlds_equal_megatron_core(case: dict[str, Any]) -> None:
    degrees = dict(zip(("tp", "cp", "pp", "ep", "etp"), case["degrees"], strict=True))
    layout = Layout(case["world_size"], **degrees, order=case["order"])
    assert hashlib.sha256(packed(layout)).hexdigest() == case["sha256"]


def test_16_ranks_by_hand() -> None:
    layout = Layout(16, tp=2, cp=2, pp=2, ep=4)
    assert (layout.dp, layout.edp, layout.order) == (2, 2, DEFAULT_ORDER)
    assert layout.groups("tp")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert layout.groups("cp")[:3] == [[0, 2], [1, 3], [4, 6]]
    assert layout.groups("dp")[:5] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12]]
    assert layout.groups("pp") == [[i, i + 8] for i in range(8)]
    assert layout.groups("dp-cp") == layout.groups("cp-dp")
    assert layout.groups("dp-cp")[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert layout.groups("etp") == [[i] for i in range(16)]
    assert layout.groups("edp")[:2] == [[0, 4], [1, 5]]
    assert layout.groups("tp-ep-pp") == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]
    assert layout.groups("etp-ep-pp") == layout.groups("tp-ep-pp")
    assert layout.groups("ep-dp") == layout.groups("ep-edp") == layout.groups("edp-ep")


def test_figure_2_of_the_paper() -> None:
    layout = Layout(4, tp=2, etp=2, ep=2)
    assert layout.groups("etp") == layout.groups("tp") == [[0, 1], [2, 3]]
    assert layout.groups("ep") == layout.groups("dp") == [[0, 2], [1, 3]]


def test_figure_9_of_the_paper_folds_experts_over_all_of_attention() -> None:
    layout = Layout(8, tp=2, cp=2, ep=8)
    assert (layout.dp, layout.edp) == (2, 1)
    assert layout.groups("ep") == [list(range(8))]
    assert layout.folding("ep") == {"tp": 2, "cp": 2, "dp": 2}


@pytest.mark.parametrize("world_size", [1, 6, 8, 12])
@pytest.mark.parametrize("order", [DEFAULT_ORDER, PP_MIDDLE, "pp-dp-ep-cp-tp"])
def test_partition_laws(world_size: int, order: str) -> None:
    world = list(range(world_size))
    for layout in Layout.legal(world_size, order):
        for view in VIEWS:
            for count in (1, 2, 3, 4):
                for axes in combinations(view, count):
                    groups = layout.groups("-".join(axes))
                    assert sorted(rank for group in groups for rank in group) == world
                    assert {len(g) for g in groups} == {layout.axis_size("-".join(axes))}
            for rank in world:
                of = {axis: set(layout.group_of(axis, rank)) for axis in view}
                assert all(a & b == {rank} for a, b in combinations(of.values(), 2))
        members = (tuple(layout.coordinates(r)[a] for a in VIEWS[1][:3]) for r in world)
        assert len(set(members)) == len(layout.groups("pp"))


@pytest.mark.parametrize("world_size", [6, 8, 12])
def test_each_group_meets_each_group_of_the_other_axes_once(world_size: int) -> None:
    for layout in Layout.legal(world_size):
        for view in VIEWS:
            for axis in view:
                others = "-".join(name for name in view if name != axis)
                for group in layout.groups(axis):
                    meets = [len(set(group) & set(g)) for g in layout.groups(others)]
                    assert set(meets) == {1}


def test_coordinates_are_places_in_groups_and_name_ranks_uniquely() -> None:
    layout = Layout(24, tp=2, cp=3, pp=2, ep=4, etp=3, order="ep-tp-dp-cp-pp")
    for rank in range(24):
        coordinates = layout.coordinates(rank)
        assert tuple(coordinates) == AXES
        for axis, index in coordinates.items():
            group = layout.group_of(axis, rank)
            assert group[index] == rank
            assert list(group) in layout.groups(axis)
            if len(group) > 1:
                assert group[1] - group[0] == layout.stride(axis)
    for view in VIEWS:
        places = {tuple(layout.coordinates(r)[a] for a in view) for r in range(24)}
        assert len(places) == 24


def test_joined_group_of_a_rank() -> None:
    layout = Layout(16, tp=2, cp=2, pp=2, ep=4)
    assert layout.group_of("dp-cp", 11) == (9, 11, 13, 15)
    assert layout.group_of("tp-ep-pp", 6) == (4, 5, 6, 7, 12, 13, 14, 15)
    assert layout.axis_size("dp-cp") == 4
    assert layout.axis_size("tp-ep-pp") == 8


@pytest.mark.parametrize(
    ("world_size", "pp_last", "pp_middle"),
    [(8, 46, 15), (16, 146, 35), (32, 371, 70), (64, 812, 126)],
)
def test_number_of_layouts_with_one_set_of_pipelines(
    world_size: int, pp_last: int, pp_middle: int
) -> None:
    def count(order: str) -> int:
        return sum(layout.pp > 1 for layout in Layout.legal(world_size, order))

    assert sum(degrees["pp"] > 1 for degrees in all_degrees(world_size)) == pp_last
    assert count(DEFAULT_ORDER) == pp_last
    assert count("pp-tp-cp-ep-dp") == pp_last
    assert count(PP_MIDDLE) == pp_middle


@pytest.mark.parametrize("order", [DEFAULT_ORDER, PP_MIDDLE])
def test_legal_yields_exactly_the_layouts_that_construct(order: str) -> None:
    constructed = set()
    for degrees in all_degrees(12):
        with suppress(LayoutError):
            constructed.add(Layout(12, **degrees, order=order))
    yielded = list(Layout.legal(12, order))
    assert set(yielded) == constructed
    assert len(yielded) == len(constructed)


def test_legal_refuses_a_wrong_order() -> None:
    with pytest.raises(LayoutError, match="names 'xp'"):
        next(Layout.legal(8, "tp-xp"))


def test_order_may_leave_out_axes_of_size_one() -> None:
    layout = Layout(8, tp=2, pp=2, ep=4, order="tp-ep-dp-pp")
    assert layout.order == "tp-ep-dp-pp-cp"
    assert layout == Layout(8, tp=2, pp=2, ep=4, order="tp-ep-dp-pp-cp")
    full = Layout(8, tp=2, pp=2, ep=4)
    assert all(layout.groups(axis) == full.groups(axis) for axis in AXES)


@pytest.mark.parametrize("order", ["-".join(p) for p in permutations(("tp", "cp", "dp"))])
def test_first_named_axis_has_stride_one(order: str) -> None:
    layout = Layout(30, tp=2, cp=3, order=f"{order}-pp")
    fast, middle, slow = order.split("-")
    assert layout.stride(fast) == 1
    assert layout.stride(middle) == layout.axis_size(fast)
    assert layout.stride(slow) == layout.axis_size(f"{fast}-{middle}")


@pytest.mark.parametrize("axis", ["tp", "dp-cp", "ep", "tp-ep-pp"])
def test_a_rank_outside_the_world_is_refused(axis: str) -> None:
    layout = Layout(8, tp=2, pp=2, ep=4)
    for rank in (-1, 8):
        with pytest.raises(LayoutError, match=f"rank {rank} is not in the world; legal: 0 to 7"):
            layout.group_of(axis, rank)
        with pytest.raises(LayoutError, match="legal: 0 to 7"):
            layout.coordinates(rank)


def test_a_join_has_no_stride() -> None:
    with pytest.raises(LayoutError, match="'dp-cp'"):
        Layout(8, cp=2).stride("dp-cp")


def test_spans_counts_nodes() -> None:
    layout = Layout(32, tp=2, cp=2, pp=2, ep=8)
    assert [layout.spans(axis) for axis in AXES] == [1, 1, 2, 2, 1, 1, 2]
    assert layout.spans("dp-cp") == 2
    assert layout.spans("tp-cp-dp-pp") == 4
    assert layout.spans("pp", ranks_per_node=32) == 1
    assert layout.spans("tp", ranks_per_node=1) == 2
    # Not aligned: groups of three ranks on nodes of four.
    assert Layout(12, ep=3).spans("ep", ranks_per_node=4) == 2
    with pytest.raises(
        LayoutError, match="ranks_per_node must be an integer of at least 1, found 0"
    ):
        layout.spans("tp", 0)


def test_dict_round_trip() -> None:
    layout = Layout(16, tp=2, cp=2, pp=2, ep=4, order="tp-cp-ep-dp-pp")
    data = layout.to_dict()
    assert data == {
        "world_size": 16, "tp": 2, "cp": 2, "pp": 2, "ep": 4, "etp": 1, "order": DEFAULT_ORDER,
    }  # fmt: skip
    assert Layout.from_dict(json.loads(json.dumps(data))) == layout
    assert Layout.from_dict({"world_size": 4}) == Layout(4)
    with pytest.raises(LayoutError, match=r"found unknown \['dp'\]"):
        Layout.from_dict({"world_size": 4, "dp": 2})
    with pytest.raises(LayoutError, match="world_size is missing"):
        Layout.from_dict({"tp": 2})


def test_is_an_immutable_hashable_value() -> None:
    layout = Layout(8, tp=2, ep=4)
    assert {layout: 1}[Layout(8, tp=2, ep=4)] == 1
    assert layout != Layout(8, tp=2, ep=2)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert replace(layout, ep=2) == Layout(8, tp=2, ep=2)
    with pytest.raises(FrozenInstanceError):
        layout.tp = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Layout(8, 2)  # type: ignore[call-arg]


def test_groups_are_fresh_lists() -> None:
    layout = Layout(4, tp=2)
    layout.groups("tp")[0].append(99)
    assert layout.groups("tp") == [[0, 1], [2, 3]]


def test_ten_thousand_ranks_are_fast() -> None:
    start = time.process_time()
    layout = Layout(10_000, tp=4, cp=5, pp=5, ep=20, etp=2)
    sizes = [len(layout.groups(axis)) for axis in AXES]
    assert time.process_time() - start < 0.5
    assert sizes == [2500, 2000, 100, 2000, 5000, 500, 200]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, fivefold.parallel_core.layout; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
