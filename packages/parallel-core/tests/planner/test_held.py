"""Closed forms of what is held, against torch's schedules."""

import random
from itertools import product

import pytest

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.in_flight import ChunkBytes, peak_bytes, schedule_orders
from fivefold.parallel_core.pipeline_config import PipelineConfig, Schedule
from fivefold.parallel_core.planner.held import CLOSED, peak_held


def from_schedule(config: PipelineConfig, ranks: int, count: int, sizes: list[int]) -> list[int]:
    peaks = []
    for rank, order in schedule_orders(config, ranks, count).items():
        chunks = {
            config.stage_index(rank, part, ranks): ChunkBytes(forward=size, after_input=size)
            for part, size in enumerate(sizes)
        }
        peaks.append(peak_bytes(order, chunks))
    return peaks


@pytest.mark.parametrize(("schedule", "ranks"), list(product(CLOSED, (2, 3, 4))))
def test_the_closed_forms_are_the_schedules(schedule: Schedule, ranks: int) -> None:
    chance = random.Random(1)
    for parts, rounds in product((2, 3, 4), (1, 2, 3, 5)):
        stages = parts if schedule == "Interleaved1F1B" else 1
        config = PipelineConfig(schedule=schedule, stages_per_rank=stages)
        for sizes in ([1] * stages, [chance.randint(1, 99) for _ in range(stages)]):
            count = ranks * rounds
            found = [peak_held(config, rank, ranks, count, sizes) for rank in range(ranks)]
            assert found == from_schedule(config, ranks, count, sizes), (stages, count, sizes)


def test_other_schedules_are_read_off_torch() -> None:
    config = PipelineConfig(schedule="DualPipeV", stages_per_rank=2)
    found = [peak_held(config, rank, 2, 6, [1, 1]) for rank in range(2)]
    assert found == from_schedule(config, 2, 6, [1, 1])


def test_too_few_microbatches() -> None:
    with pytest.raises(ConfigError, match="needs at least 4 microbatches"):
        peak_held(PipelineConfig(), 0, 4, 2, [1])
