"""Every reason for which a layout or an axis is refused, with its numbers."""

import pytest

from fivefold.parallel_core.layout import Layout, LayoutError, explain_illegal
from fivefold.parallel_core.layout_rules import full_order, parse_axis, view_axes


def reasons(world_size: int, **arguments: object) -> list[str]:
    """The reasons, after checking that Layout raises exactly this message."""
    message = explain_illegal(world_size, **arguments)  # type: ignore[arg-type]
    with pytest.raises(LayoutError) as caught:
        Layout(world_size, **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message
    head, *rest = message.split("\n  - ")
    assert head.startswith(f"Layout({world_size!r}, tp=")
    assert head.endswith("is not legal:")
    return rest


def test_a_legal_layout_has_no_reasons() -> None:
    assert explain_illegal(16, tp=2, cp=2, pp=2, ep=4) == ""
    assert issubclass(LayoutError, ValueError)


def test_degrees_must_be_positive_integers() -> None:
    assert reasons(8, tp=0, ep=-1) == [
        "tp must be an integer of at least 1, found 0",
        "ep must be an integer of at least 1, found -1",
    ]
    assert reasons(0) == ["world_size must be an integer of at least 1, found 0"]
    assert reasons(8, cp=2.0) == ["cp must be an integer of at least 1, found 2.0"]
    assert reasons(8, pp=True) == ["pp must be an integer of at least 1, found True"]
    assert reasons(8, etp="2") == ["etp must be an integer of at least 1, found '2'"]


def test_attention_must_divide_the_world() -> None:
    assert reasons(8, tp=3) == [
        "world_size 8 is not a multiple of tp*cp*pp = 3*1*1 = 3 (remainder 2);"
        " nearest legal: tp=2 or 4, or world_size=6 or 9"
    ]
    assert reasons(12, tp=4, cp=2) == [
        "world_size 12 is not a multiple of tp*cp*pp = 4*2*1 = 8 (remainder 4);"
        " nearest legal: tp=3 or 6, or cp=1 or 3, or world_size=8 or 16"
    ]


def test_experts_must_divide_the_world() -> None:
    assert reasons(16, pp=2, ep=3, etp=2) == [
        "world_size 16 is not a multiple of etp*ep*pp = 2*3*2 = 12 (remainder 4);"
        " nearest legal: ep=2 or 4, or world_size=12 or 24"
    ]


def test_a_proposed_pp_divides_the_world_in_both_views() -> None:
    # Attention alone would also allow pp=3, but then the experts would take 36 ranks.
    assert reasons(24, tp=8, pp=2, ep=12) == [
        "world_size 24 is not a multiple of tp*cp*pp = 8*1*2 = 16 (remainder 8);"
        " nearest legal: tp=6 or 12, or pp=1, or world_size=48"
    ]


def test_a_world_too_small_names_the_least_world() -> None:
    (reason,) = reasons(8, tp=16)
    assert reason.endswith("= 16 (remainder 8); nearest legal: tp=8, or world_size=16")


def test_both_views_report_and_worlds_suit_both() -> None:
    attention, experts = reasons(8, tp=3, ep=5)
    assert "tp*cp*pp = 3*1*1 = 3" in attention
    assert "tp=2 or 4, or world_size=15" in attention
    assert "etp*ep*pp = 1*5*1 = 5" in experts
    assert "ep=4 or 8, or world_size=15" in experts


def test_order_names_each_axis_once() -> None:
    legal = "legal: each of tp, cp, ep, dp, pp once, joined by '-'"
    assert reasons(8, order="tp-xp-tp") == [
        f"order 'tp-xp-tp' names 'xp', which is not an axis; {legal}",
        f"order 'tp-xp-tp' names 'tp' 2 times; {legal}",
    ]
    assert reasons(8, order="etp-ep-dp-pp") == [
        f"order 'etp-ep-dp-pp' names 'etp', which is not an axis; {legal}"
        " (etp and edp stand where tp and dp stand)"
    ]
    assert reasons(8, order="") == [f"order '' names '', which is not an axis; {legal}"]
    assert reasons(8, order=5) == [f"order must be a string, found 5; {legal}"]


def test_sizes_and_order_are_reported_together() -> None:
    first, second = reasons(8, tp=3, order="tp-xp")
    assert "remainder 2" in first
    assert "names 'xp'" in second


def test_only_axes_of_size_one_may_be_left_out() -> None:
    assert reasons(8, tp=2, order="cp-ep-dp-pp") == [
        "order 'cp-ep-dp-pp' leaves out 'tp' but tp=2 and etp=1; only axes of size 1 may be left"
        " out, legal: 'cp-ep-dp-pp-tp', or 'tp' at another place"
    ]
    # dp is 1 for attention here, but the experts' edp stands in the same place.
    (reason,) = reasons(8, tp=8, order="tp-pp")
    assert "leaves out 'dp' but dp=1 and edp=8" in reason
    assert Layout(8, tp=8, etp=8, order="tp").order == "tp-cp-ep-dp-pp"


def test_pipelines_must_agree() -> None:
    assert reasons(16, tp=2, cp=2, pp=2, ep=4, order="tp-cp-pp-ep-dp") == [
        "order 'tp-cp-pp-ep-dp' gives pp=2 the rank stride tp*cp = 4 (first group [0, 4]) for"
        " attention but etp = 1 (first group [0, 1]) for experts, and both views must have the"
        " same pipeline groups; legal: put pp last (order='tp-cp-ep-dp-pp'), or choose degrees"
        " that make the strides equal"
    ]
    (reason,) = reasons(64, cp=2, pp=8, ep=8, order="ep-pp-cp-tp-dp")
    assert "stride 1 (first group [0, 1, 2, 3, ...]) for attention but ep = 8 (first" in reason
    assert "put pp last (order='ep-cp-tp-dp-pp')" in reason


def test_pp_in_the_middle_is_legal_when_the_strides_agree() -> None:
    layout = Layout(16, tp=2, cp=2, pp=2, ep=2, etp=4, order="tp-cp-pp-ep-dp")
    assert layout.groups("pp")[:2] == [[0, 4], [1, 5]]
    assert Layout(16, tp=2, cp=2, ep=4, order="tp-cp-pp-ep-dp").groups("pp") == [
        [rank] for rank in range(16)
    ]


def test_pp_first_is_always_legal() -> None:
    layout = Layout(16, tp=2, cp=2, pp=2, ep=4, order="pp-tp-cp-ep-dp")
    assert layout.groups("pp") == [[rank, rank + 1] for rank in range(0, 16, 2)]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tp", (False, frozenset({"tp"}))),
        ("pp", (False, frozenset({"pp"}))),
        ("dp-cp", (False, frozenset({"dp", "cp"}))),
        ("ep", (True, frozenset({"ep"}))),
        ("tp-ep-pp", (True, frozenset({"etp", "ep", "pp"}))),
        ("ep-dp", (True, frozenset({"ep", "edp"}))),
        ("tp-edp", (True, frozenset({"etp", "edp"}))),
    ],
)
def test_naming_an_expert_axis_selects_the_expert_view(
    name: str, found: tuple[bool, frozenset[str]]
) -> None:
    assert parse_axis(name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cp-ep", "axis 'cp-ep': 'cp' is not in the expert view ('etp', 'ep', 'edp', 'pp')"),
        ("xx", "axis 'xx': 'xx' is not in either view"),
        ("", "axis '': '' is not in either view"),
        ("tp-tp", "axis 'tp-tp' names an axis of the view ('tp', 'cp', 'dp', 'pp') twice"),
        ("tp-etp", "axis 'tp-etp' names an axis of the view ('etp', 'ep', 'edp', 'pp') twice"),
    ],
)
def test_wrong_axes_are_refused(name: str, message: str) -> None:
    layout = Layout(8)
    for ask in (layout.groups, layout.axis_size, layout.spans, layout.stride, layout.folding):
        with pytest.raises(LayoutError) as caught:
            ask(name)
        assert str(caught.value).startswith(message)
        assert "legal: one axis or a join such as 'tp-cp' of (tp, cp, dp, pp)" in str(caught.value)


def test_views_of_an_order() -> None:
    assert full_order("pp-dp") == "pp-dp-tp-cp-ep"
    assert view_axes("ep-tp-dp-cp-pp", experts=False) == ("tp", "dp", "cp", "pp")
    assert view_axes("ep-tp-dp-cp-pp", experts=True) == ("ep", "etp", "edp", "pp")
