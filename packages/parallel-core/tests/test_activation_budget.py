"""Training under a budget of bytes: what is recomputed, how much is kept, and that it is equal."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.build import build
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError, RankError
from fivefold.parallel_core.in_flight import Order, orders_of, schedule_orders
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.moving_window import Chunk, StageBytes, choose_stored, window_peak
from fivefold.parallel_core.pipeline import PipelineRunner
from fivefold.parallel_core.pipeline_config import SCHEDULES, PipelineConfig
from fivefold.parallel_core.recomputing import is_recomputing, is_requested
from fivefold.parallel_core.topology import Topology

from .gpt_stages import Pipeline, config_of
from .rig import Case, make_job
from .toy import HEAD, TAIL, Toy, ToyConfig, plan

P, M = 2, 6
PLENTY = 2**40


class Step(NamedTuple):
    """One step: its results, what it asked to recompute, how often it did, and its peak."""

    results: list[Tensor]
    recomputed: set[Chunk]
    repetitions: int
    peak: int


def run(pipeline: Pipeline) -> Step:
    """A step of this rank, watched at the first layer of each stage."""
    forwards: dict[int, list[bool]] = {stage: [] for stage in pipeline.stages}
    repetitions = []

    def note(stage: int) -> None:
        if is_recomputing():
            repetitions.append(stage)
        else:
            forwards[stage].append(is_requested())

    handles = [
        next(iter(part.layers.values())).register_forward_pre_hook(
            lambda *_, stage=stage: note(stage)
        )
        for part, stage in zip(pipeline.parts, pipeline.stages, strict=True)
    ]
    # A repetition calls the layer's forward, below its hooks; its first norm is inside.
    handles += [
        next(iter(part.layers.values())).attention_norm.register_forward_pre_hook(
            lambda *_, stage=stage: note(stage) if is_recomputing() else None
        )
        for part, stage in zip(pipeline.parts, pipeline.stages, strict=True)
    ]
    with ActivationLedger(nn.ModuleList(pipeline.parts)) as ledger:
        results = pipeline.step()
    for handle in handles:
        handle.remove()
    assert ledger.live == 0
    asked = {stage: iter(flags) for stage, flags in forwards.items()}
    recomputed = {a[1:] for a in pipeline.order if a.kind == "F" and next(asked[a.stage])}
    return Step(results, recomputed, len(repetitions), ledger.peak)


def repetitions(order: Order, recomputed: set[Chunk]) -> int:
    """Each part of a backward repeats a layer; the first stage has no part for inputs."""
    return sum(
        a.kind != "F" and not (a.kind == "I" and a.stage == 0) for a in order if a[1:] in recomputed
    )


def same(a: Step, b: Step) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.results, b.results, strict=True))


def under_a_budget(schedule: str) -> dict[int, StageBytes]:
    """All checks on one rank; the sizes of its stages."""
    plain = Pipeline(config_of(schedule), P, M)
    free = run(plain)
    assert (free.recomputed, free.repetitions) == (set(), 0)

    plenty = Pipeline(config_of(schedule, PLENTY), P, M)
    order, everything = plenty.order, {a[1:] for a in plenty.order}
    firsts = {(stage, 0) for stage in plenty.stages}
    first, later = run(plenty), run(plenty)
    assert first.recomputed == everything - firsts
    assert later.recomputed == set()
    assert same(first, free) and same(later, free)
    budget = plenty.runner.budget
    assert budget is not None
    sizes = budget.sizes
    most, least = (window_peak(order, sizes, stored) for stored in (everything, firsts))
    assert later.peak <= most

    middle = (2 * least + most) // 3
    pipeline = Pipeline(config_of(schedule, middle), P, M)
    run(pipeline)
    for _ in range(2):
        step = run(pipeline)
        stored = choose_stored(order, sizes, middle)
        assert step.recomputed == everything - stored
        # The last rank of 1F1B has one in flight, which always fits.
        assert bool(step.recomputed) == (least < most)
        assert step.recomputed < everything
        assert step.repetitions == repetitions(order, step.recomputed)
        assert same(step, free)
        predicted = window_peak(order, sizes, stored)
        assert step.peak <= predicted <= middle
        if all(a.kind in "FB" for a in order):
            assert step.peak == predicted
            assert later.peak == most
    return dict(sizes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_budgeted_steps_are_predicted_within_it_and_bitwise_equal(schedule: str) -> None:
    for rank, sizes in enumerate(launch(under_a_budget, P, schedule, timeout=300)):
        config = config_of(schedule)
        stages = {config.stage_index(rank, part, P) for part in range(config.stages_per_rank)}
        assert set(sizes) == stages
        assert all(0 < size.recomputed < size.stored for size in sizes.values())


def test_a_budget_for_k_of_1f1b_recomputes_all_but_k_of_each_round() -> None:
    def on_a_rank() -> tuple[int, int]:
        plenty = Pipeline(config_of("1F1B", PLENTY), P, M)
        plenty.step(), plenty.step()
        assert plenty.runner.budget is not None
        (size,) = plenty.runner.budget.sizes.values()
        pipeline = Pipeline(config_of("1F1B", size.stored + size.recomputed), P, M)
        pipeline.step()
        return len(run(pipeline).recomputed), run(pipeline).repetitions

    # Rank 0 has two in flight and stores every other; rank 1 has one.
    assert launch(on_a_rank, P, timeout=300) == [(M // 2, M // 2), (0, 0)]


def test_a_budget_too_small_says_what_one_microbatch_takes() -> None:
    order = schedule_orders(config_of("1F1B"), P, M)[0]

    def on_a_rank() -> int:
        plenty = Pipeline(config_of("1F1B", PLENTY), P, M)
        plenty.step(), plenty.step()
        assert plenty.runner.budget is not None
        (size,) = plenty.runner.budget.sizes.values()
        enough = window_peak(order, {0: size}, {(0, 0)}) if plenty.rank == 0 else PLENTY
        Pipeline(config_of("1F1B", enough), P, M).step()
        few = Pipeline(config_of("1F1B", enough - 1), P, M)
        if plenty.rank == 0:
            with pytest.raises(
                ConfigError,
                match=rf"activation_budget={enough - 1:,} bytes cannot hold one stored microbatch "
                rf"of stage 0 and the others recomputed, which takes {enough:,}; from "
                rf"{2 * size.stored:,} on nothing is recomputed",
            ):
                few.step()
            raise ConfigError("as expected")
        few.step()
        return 0

    with pytest.raises(RankError, match="as expected"):
        launch(on_a_rank, P, timeout=300)


def test_evaluation_is_not_limited_and_changes_nothing() -> None:
    def on_a_rank() -> bool:
        pipeline = Pipeline(config_of("Interleaved1F1B", PLENTY), P, M)
        data = pipeline.inputs, pipeline.targets
        before = pipeline.runner.evaluate(*data)
        assert pipeline.runner.budget is not None
        assert not pipeline.runner.budget.sizes
        first = pipeline.step()
        after = pipeline.runner.evaluate(*data)
        later = pipeline.step()
        assert pipeline.runner.budget.sizes
        assert before.shape == after.shape == ()
        return all(torch.equal(a, b) for a, b in zip(first, later, strict=True))

    assert launch(on_a_rank, P, timeout=300) == [True, True]


MIXED = Precision(parameters="float32", compute="bfloat16")
FREEING = DataParallelConfig(form="zero3")


def sharded(schedule: str, degrees: dict[str, int]) -> tuple[int, int, int]:
    """Peak, prediction, and bytes of the step's own data, with FSDP and 16-bit copies."""
    budget = PLENTY
    for _ in range(2):
        job = make_job(
            Case(
                degrees=degrees,
                config=ToyConfig(num_layers=5),
                schedule=schedule,
                stages_per_rank=1 if schedule == "1F1B" else 2,
                precision=MIXED,
                data=FREEING,
                activation_budget=budget,
            )
        )
        job.backward()
        with ActivationLedger(nn.ModuleList(job.model.parts)) as ledger:
            job.backward()
        assert isinstance(job.runner, PipelineRunner) and job.runner.budget is not None
        order = orders_of(job.runner.schedule)[job.topology.rank("pp")]
        found = job.runner.budget
        firsts = {a[1:] for a in order if a.microbatch == 0}
        budget = (window_peak(order, found.sizes, firsts) + ledger.peak) // 2
    data = sum(x.untyped_storage().nbytes() for x in job.data())
    return ledger.peak, window_peak(order, found.sizes, found.stored), data


@pytest.mark.parametrize(
    ("schedule", "degrees"), [("1F1B", {"pp": 2}), ("Interleaved1F1B", {"pp": 2, "tp": 2})]
)
def test_sharded_parameters_and_their_copies_do_not_count(
    schedule: str, degrees: dict[str, int]
) -> None:
    for peak, predicted, data in launch(sharded, 4, schedule, degrees, timeout=300):
        # Ids and targets of the whole step, which are there anyway.
        assert peak - predicted in (0, data // 2, data)


@pytest.mark.parametrize(
    ("budget", "message"), [(0, "=0; it is a number of bytes above 0"), (-5, "=-5; it is")]
)
def test_a_budget_that_is_none_is_refused(budget: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"activation_budget{message}"):
        PipelineConfig(activation_budget=budget)


def test_a_budget_needs_a_pipeline() -> None:
    with pytest.raises(ConfigError, match="in a pipeline; pp is 1, where there is one at a time"):
        PipelineConfig(activation_budget=1).check(1, 4)


def test_a_budget_and_layers_that_are_always_recomputed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0 cannot be recomputed on request; it is"):
        build(
            lambda: Toy(ToyConfig()),
            Topology.local(),
            plan(ToyConfig()),
            head=HEAD,
            tail=TAIL,
            pipeline=PipelineConfig(activation_budget=1),
            regions="full",
        )
