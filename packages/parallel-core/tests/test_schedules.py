"""Every pipeline schedule trains as one process, with mixtures, side losses and recomputation.

Also where the output layer is the embedding, whose two stages are two ranks or one.
"""

from functools import cache

import pytest
import torch

from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.in_flight import orders_of
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.moving_window import window_peak
from fivefold.parallel_core.pipeline import PipelineRunner
from fivefold.parallel_core.pipeline_config import SCHEDULES, V_SHAPED, PipelineConfig

from .rig import DOUBLE, Case, Record, make_job, parallel_run, plain_run, worst
from .toy import ToyConfig, resized

TOLERANCE = 1e-12
STEPS = 2
CONFIG = ToyConfig(num_layers=5, num_experts=4)
FREEING = DataParallelConfig(form="zero3")
TIED = resized(CONFIG, tied=True, num_key_heads=1)


def cases(schedule: str) -> list[Case]:
    stages = 1 if schedule in ("GPipe", "1F1B") else 2
    common = {"schedule": schedule, "stages_per_rank": stages, "precision": DOUBLE}
    return [
        Case(degrees={"tp": 2, "pp": 2, "ep": 2}, config=CONFIG, **common),
        Case(degrees={"cp": 2, "pp": 2, "ep": 4}, config=CONFIG, data=FREEING, **common),
        Case(degrees={"tp": 2, "pp": 2, "ep": 2}, config=TIED, **common),
    ]


def recomputing(schedule: str, regions: str, budget: int | None) -> Case:
    """Everything at once: sharded over all axes, and regions recomputed."""
    stages = 1 if schedule in ("GPipe", "1F1B") else 2
    return Case(
        degrees={"tp": 2, "pp": 2, "ep": 2},
        config=CONFIG,
        schedule=schedule,
        stages_per_rank=stages,
        regions=regions,
        activation_budget=budget,
    )


@cache
def reference(config: ToyConfig) -> Record:
    """One process; ranks that are forked after it was asked for need not train again."""
    return plain_run(config, STEPS)


def on_a_rank(schedule: str) -> list[tuple[float, str]]:
    found = []
    for case in cases(schedule):
        job = make_job(case)
        found.append(worst(job, parallel_run(job, STEPS), reference(case.config)))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eight_ranks_train_as_one(schedule: str) -> None:
    reference(CONFIG), reference(TIED)
    for found in launch(on_a_rank, 8, schedule, timeout=300):
        assert max(found) < (TOLERANCE, "")


def recomputing_on_a_rank(schedule: str) -> list[tuple[float, str]]:
    found = []
    if schedule in V_SHAPED:  # and whose backward is in two parts
        job = make_job(recomputing(schedule, "full", None))
        found.append(worst(job, parallel_run(job, STEPS), reference(CONFIG)))

    plenty = make_job(recomputing(schedule, "selective", 2**40))
    plenty.backward(), plenty.backward()
    runner = plenty.runner
    assert isinstance(runner, PipelineRunner) and runner.budget is not None
    order = orders_of(runner.schedule)[plenty.topology.rank("pp")]
    firsts, everything = {a[1:] for a in order if a.microbatch == 0}, {a[1:] for a in order}
    least, most = (window_peak(order, runner.budget.sizes, s) for s in (firsts, everything))
    # Ranks of one stage have other experts' tokens, and must have found the same all the same.
    sizes = gather_along(torch.tensor([[least, most]]), plenty.topology.axis("tp-dp-cp"), 0)
    assert len(set(map(tuple, sizes.tolist()))) == 1

    job = make_job(recomputing(schedule, "selective", (least + most) // 2))
    found.append(worst(job, parallel_run(job, STEPS), reference(CONFIG)))
    runner = job.runner
    assert isinstance(runner, PipelineRunner) and runner.budget is not None
    assert runner.budget.stored
    assert (runner.budget.stored < everything) == (least < most)
    return found


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_recomputed_regions_and_a_byte_budget_train_as_one(schedule: str) -> None:
    reference(CONFIG)
    for found in launch(recomputing_on_a_rank, 8, schedule, timeout=300):
        assert max(found) < (TOLERANCE, "")


def test_v_shaped_schedules_have_both_ends_on_the_first_rank() -> None:
    for schedule in V_SHAPED:
        config = PipelineConfig(schedule=schedule, stages_per_rank=2)  # type: ignore[arg-type]
        placed = {rank: [config.stage_index(rank, i, 4) for i in (0, 1)] for rank in range(4)}
        assert placed == {0: [0, 7], 1: [1, 6], 2: [2, 5], 3: [3, 4]}
    config = PipelineConfig(schedule="LoopedBFS", stages_per_rank=3)
    assert [config.stage_index(1, i, 4) for i in range(3)] == [1, 5, 9]
