"""Every pipeline schedule trains as one process, with mixtures, side losses and recomputation."""

import pytest

from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.pipeline_config import SCHEDULES, V_SHAPED, PipelineConfig

from .rig import DOUBLE, Case, make_job, parallel_run, plain_run, worst
from .toy import ToyConfig

TOLERANCE = 1e-12
CONFIG = ToyConfig(num_layers=5, num_experts=4)


def cases(schedule: str) -> list[Case]:
    stages = 1 if schedule in ("GPipe", "1F1B") else 2
    common = {
        "config": CONFIG,
        "schedule": schedule,
        "stages_per_rank": stages,
        "precision": DOUBLE,
    }
    return [
        Case(degrees={"tp": 2, "pp": 2, "ep": 2}, microbatch_size=1, **common),
        Case(degrees={"cp": 2, "pp": 2, "ep": 4}, microbatch_size=1, **common),
    ]


def on_a_rank(schedule: str) -> list[tuple[float, str]]:
    reference = plain_run(CONFIG)
    found = []
    for case in cases(schedule):
        job = make_job(case)
        found.append(worst(job, parallel_run(job), reference))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eight_ranks_train_as_one(schedule: str) -> None:
    for found in launch(on_a_rank, 8, schedule, timeout=300):
        assert max(found) < (TOLERANCE, "")


def test_v_shaped_schedules_have_both_ends_on_the_first_rank() -> None:
    for schedule in V_SHAPED:
        config = PipelineConfig(schedule=schedule, stages_per_rank=2)  # type: ignore[arg-type]
        placed = {rank: [config.stage_index(rank, i, 4) for i in (0, 1)] for rank in range(4)}
        assert placed == {0: [0, 7], 1: [1, 6], 2: [2, 5], 3: [3, 4]}
    config = PipelineConfig(schedule="LoopedBFS", stages_per_rank=3)
    assert [config.stage_index(1, i, 4) for i in range(3)] == [1, 5, 9]
