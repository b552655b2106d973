"""Work in the gaps of dispatchers."""

import pytest
import torch

from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.dispatchers import DispatchConfig, dispatcher_for
from fivefold.moe.meanwhile import Meanwhile
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

KINDS = ("all_to_all", "deduplicated", "all_gather")


def counted() -> tuple[Meanwhile, list[int]]:
    calls: list[int] = []

    def compute() -> torch.Tensor:
        calls.append(len(calls))
        return torch.full((1,), float(len(calls)))

    return Meanwhile(compute), calls


def dispatch(dispatcher: TokenDispatcher, meanwhile: Meanwhile) -> None:
    experts_nk = torch.arange(6).view(3, 2) % 4
    dispatcher.dispatch(torch.ones(3, 5), experts_nk, meanwhile=meanwhile)


def test_is_computed_once_and_early_where_asked() -> None:
    meanwhile, calls = counted()
    assert calls == []
    meanwhile.run()
    meanwhile.run()
    assert calls == [0]
    assert meanwhile.value.item() == meanwhile.value.item() == 1
    assert calls == [0]


def test_a_rank_alone_has_no_gap() -> None:
    meanwhile, calls = counted()
    dispatch(TokenDispatcher(4), meanwhile)
    assert calls == [] and meanwhile.value.item() == 1


def calls_of_dispatchers() -> dict[str, tuple[int, float]]:
    topology, found = Topology(Layout(2, ep=2)), {}
    for kind in KINDS:
        meanwhile, calls = counted()
        config = DispatchConfig(dispatcher=kind)  # type: ignore[arg-type]
        dispatch(dispatcher_for(config, 4, topology), meanwhile)
        found[kind] = (len(calls), meanwhile.value.item())
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, tuple[int, float]]]:
    return launch(calls_of_dispatchers, 2, timeout=120)


@pytest.mark.parametrize(("kind", "early"), [(KINDS[0], 1), (KINDS[1], 1), (KINDS[2], 0)])
def test_rows_on_their_way_leave_a_gap(
    by_rank: list[dict[str, tuple[int, float]]], kind: str, early: int
) -> None:
    for found in by_rank:
        assert found[kind] == (early, 1.0)
