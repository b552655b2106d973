"""The table and the words that explain a layout."""

import time
from functools import partial

import pytest

from fivefold.parallel_core.errors import LayoutError
from fivefold.parallel_core.layout import Layout


def test_explain_shows_both_views_side_by_side() -> None:
    text = Layout(16, tp=2, cp=2, pp=2, ep=4).explain()
    left = "attention  size stride nodes  groups            "
    assert text.splitlines() == [
        "16 ranks on 2 nodes of 8, axes from fastest to slowest: tp-cp-ep-dp-pp",
        "",
        f"{left}| experts    size stride nodes  groups",
        "tp            2      1     1  [0 1] [2 3] ..(8) "
        "| etp           1      1     1  [0] [1] ..(16)",
        "cp            2      2     1  [0 2] [1 3] ..(8) "
        "| ep            4      1     1  [0 1 2 3] [4 5 6 7] ..(4)",
        "dp            2      4     1  [0 4] [1 5] ..(8) "
        "| edp           2      4     1  [0 4] [1 5] ..(8)",
        "pp            2      8     2  [0 8] [1 9] ..(8) "
        "| pp            2      8     2  [0 8] [1 9] ..(8)",
        "",
        "etp=1 folds nothing",
        "ep=4 folds tp(2) x cp(2)",
        "edp=2 folds dp(2)",
        "pp=2 is the same in both views",
    ]


def test_explain_of_one_rank() -> None:
    first = Layout(1).explain().splitlines()[0]
    assert first == "1 rank on 1 node of 8, axes from fastest to slowest: tp-cp-ep-dp-pp"


def test_explain_abbreviates_large_worlds_and_stays_fast() -> None:
    start = time.process_time()
    text = Layout(6144, tp=2, pp=8, ep=64).explain()
    assert time.process_time() - start < 2
    assert "[0 1 .. 63] [64 65 .. 127] ..(96)" in text
    assert "ep=64 folds tp(2) x dp(32 of 384)" in text
    assert max(map(len, text.splitlines())) < 160


@pytest.mark.parametrize(
    ("layout", "axis", "folding"),
    [
        (Layout(8, tp=2, pp=2, ep=4), "ep", {"tp": 2, "dp": 2}),
        (Layout(8, tp=2, pp=2, ep=4), "etp", {}),
        (Layout(8, tp=2, etp=2, ep=4), "etp", {"tp": 2}),
        (Layout(8, tp=2, etp=2, ep=4), "ep", {"dp": 4}),
        (Layout(32, tp=2, cp=2, ep=8), "ep", {"tp": 2, "cp": 2, "dp": 2}),
        (Layout(32, tp=2, cp=2, ep=8), "edp", {"dp": 4}),
        (Layout(8, tp=4, ep=2), "ep", {"tp": 2}),
        (Layout(8, tp=4, ep=2), "edp", {"tp": 2, "dp": 2}),
        (Layout(8, tp=2, pp=2, ep=4), "etp-ep-edp-pp", {"tp": 2, "dp": 2, "pp": 2}),
        (Layout(12, tp=2, ep=3), "ep", None),
        # The first group alone would be a product: ranks 0 and 1 share dp, ranks 2 and 3 do not.
        (Layout(12, tp=3, ep=2), "ep", None),
    ],
)
def test_folding(layout: Layout, axis: str, folding: dict[str, int] | None) -> None:
    assert layout.folding(axis) == folding


def test_folding_in_words() -> None:
    assert "\nep=2 folds tp(2 of 4)\n" in Layout(8, tp=4, ep=2).explain()
    cut = "ep=3 cuts across attention axes: its groups are no product of them"
    assert cut in Layout(12, tp=2, ep=3).explain()


@pytest.mark.parametrize("number", [0, -8, 2.5, "8", True, None])
def test_explain_refuses_what_is_no_number_of_ranks(number: object) -> None:
    message = f"ranks_per_node must be an integer of at least 1, found {number!r}"
    for ask in (Layout(8).explain, partial(Layout(8).spans, "tp")):
        with pytest.raises(LayoutError, match=message):
            ask(number)  # type: ignore[operator]
