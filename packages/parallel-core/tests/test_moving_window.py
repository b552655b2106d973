"""The window of stored microbatches, from orders and numbers alone."""

import random

import pytest

from fivefold.parallel_core.in_flight import Order, most_in_flight, schedule_orders
from fivefold.parallel_core.moving_window import StageBytes, choose_stored, window_peak
from fivefold.parallel_core.pipeline_config import SCHEDULES, PipelineConfig

from .gpt_stages import config_of

SIZE = StageBytes(stored=10, recomputed=1)


def budget_for(stored: int, in_flight: int) -> int:
    return stored * SIZE.stored + (in_flight - stored) * SIZE.recomputed


def test_the_papers_picture() -> None:
    """Figure 10: 4 stages, 9 microbatches; the first stage stores one of each four."""
    orders = schedule_orders(PipelineConfig(), 4, 9)
    stored = choose_stored(orders[0], {0: SIZE}, budget_for(1, 4))
    assert stored == {(0, 0), (0, 4), (0, 8)}
    # Later stages have fewer in flight; with the same memory the last recomputes nothing.
    counts = [len(choose_stored(orders[i], {i: SIZE}, budget_for(1, 4))) for i in range(4)]
    assert counts == [3, 3, 5, 9]


@pytest.mark.parametrize("stored", [0, 1, 2, 3, 4])
def test_a_budget_for_k_stores_k_of_each_round(stored: int) -> None:
    order = schedule_orders(PipelineConfig(), 4, 12)[0]
    for budget in (budget_for(stored, 4), budget_for(stored, 4) + 8):
        found = choose_stored(order, {0: SIZE}, budget)
        assert found == {(0, i) for i in range(12) if i % 4 < stored}
        assert window_peak(order, {0: SIZE}, found) == budget_for(stored, 4)


def all_chunks(order: Order) -> set[tuple[int, int]]:
    return {(action.stage, action.microbatch) for action in order}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_peak_stays_within_the_budget_and_nothing_more_fits(schedule: str) -> None:
    draw = random.Random(3)
    for order in schedule_orders(config_of(schedule), 4, 8).values():
        everything = all_chunks(order)
        stages = sorted({stage for stage, _ in everything})
        sizes = {s: StageBytes(stored=draw.randint(20, 60), recomputed=5) for s in stages}
        least, most = window_peak(order, sizes, ()), window_peak(order, sizes, everything)
        assert least == 5 * most_in_flight(order)
        assert choose_stored(order, sizes, most) == everything
        assert not choose_stored(order, sizes, least - 1)
        for _ in range(5):
            budget = draw.randint(least, most)
            stored = choose_stored(order, sizes, budget)
            assert window_peak(order, sizes, stored) <= budget
            for chunk in everything - stored:
                assert window_peak(order, sizes, stored | {chunk}) > budget
