"""All legal mappings of a model: those that fit, by predicted time, and why the best is best."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.errors import ConfigError, LayoutError
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.memory import StageMemory, stage_memory, telling_ranks
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.setup import Recompute, Setup, check, divisors
from fivefold.parallel_core.planner.timing import StepTime, step_time

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be trained.

    Attributes:
        model: the model.
        world_size: devices.
        length: tokens of a sequence.
        global_batch: sequences in a step.
        microbatches: sizes of a microbatch to try.
        recomputes: what to try.
        forms: of data parallelism to try.
        most_parts: pipeline stages on each rank to try, from 1.
        causal: count half of attention's FLOPs.
    """

    model: ModelShape
    world_size: int
    length: int
    global_batch: int
    microbatches: tuple[int, ...] = (1, 2, 4)
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    forms: tuple[Form, ...] = ("zero1",)
    most_parts: int = 4
    causal: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A mapping that fits.

    Attributes:
        setup: the mapping.
        memory: of the fullest pipeline rank.
        time: of a step.
    """

    setup: Setup
    memory: StageMemory
    time: StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        plans: those that fit, the fastest first.
        num_legal: mappings that were looked at.
    """

    plans: list[Plan]
    num_legal: int


def legal_setups(job: Job) -> Iterator[Setup]:
    """Every mapping of a job that can run, whether it fits or not."""
    sizes = divisors(job.world_size)
    experts = job.model.experts
    for tp, cp, pp in product(sizes, repeat=3):
        if job.world_size % (tp * cp * pp) or pp > job.model.num_layers or job.length % cp:
            continue
        if job.model.num_heads % tp:
            continue
        for etp, ep in product(sizes, repeat=2) if experts else ((1, 1),):
            if job.world_size % (etp * ep * pp) == 0:
                yield from _variants(job, tp, cp, pp, etp, ep)


def _variants(job: Job, tp: int, cp: int, pp: int, etp: int, ep: int) -> Iterator[Setup]:
    parts = range(1, job.most_parts + 1) if pp > 1 else (1,)
    for size, again, form, count in product(job.microbatches, job.recomputes, job.forms, parts):
        setup = Setup(
            world_size=job.world_size,
            length=job.length,
            global_batch=job.global_batch,
            tp=tp,
            cp=cp,
            pp=pp,
            etp=etp,
            ep=ep,
            sequence=tp > 1,
            microbatch=size,
            recompute=again,
            pipeline=_pipeline(count),
            data=DataParallelConfig(form=form),
        )
        try:
            check(job.model, setup)
        except (ConfigError, LayoutError):
            continue
        yield setup


def _pipeline(count: int) -> PipelineConfig:
    if count == 1:
        return PipelineConfig()
    return PipelineConfig(schedule="Interleaved1F1B", stages_per_rank=count)


def fullest(model: ModelShape, setup: Setup) -> StageMemory:
    """Memory of the pipeline rank that holds most."""
    ranks = telling_ranks(model, setup)
    return max((stage_memory(model, setup, rank) for rank in ranks), key=lambda m: m.total)


def search(job: Job, machine: Hardware) -> Found:
    """Look at all legal mappings.

    Raises:
        ConfigError: none is legal, or none fits; the message has the one that comes nearest.
    """
    plans, count = [], 0
    nearest: tuple[int, Setup] | None = None
    for setup in legal_setups(job):
        count += 1
        held = fullest(job.model, setup)
        if held.total <= machine.usable:
            time = step_time(job.model, setup, machine, job.causal)
            plans.append(Plan(setup=setup, memory=held, time=time))
        elif nearest is None or held.total < nearest[0]:
            nearest = (held.total, setup)
    if not plans:
        raise ConfigError(_nothing(job, machine, nearest))
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.total))
    return Found(plans=plans, num_legal=count)


def _nothing(job: Job, machine: Hardware, nearest: tuple[int, Setup] | None) -> str:
    asked = f"{job.model.name} on {job.world_size} x {machine.name}, length {job.length}, "
    asked += f"batch {job.global_batch}"
    if nearest is None:
        return (
            f"{asked}: no mapping is legal; choose a batch that is a multiple of {job.world_size}"
        )
    size, setup = nearest
    return (
        f"{asked}: no mapping fits in {machine.usable / GIB:.1f} GiB; the nearest, "
        f"{describe(setup)}, needs {size / GIB:.1f} GiB; take more devices"
    )


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no other beats in both time and memory, the fastest first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.time.total, plan.memory.total)):
        if not found or plan.memory.total < found[-1].memory.total:
            found.append(plan)
    return found


def describe(setup: Setup) -> str:
    """A mapping in a few words."""
    axes = " ".join(f"{name}{getattr(setup, name)}" for name in ("tp", "cp", "dp", "pp"))
    experts = f" etp{setup.etp} ep{setup.ep}" if setup.etp * setup.ep > 1 else ""
    parts = setup.pipeline.stages_per_rank
    return (
        f"{axes}{experts}{f' x{parts} stages' if parts > 1 else ''} microbatch {setup.microbatch} "
        f"recompute {setup.recompute} {setup.data.form}"
    )


def explain(best: Plan, other: Plan) -> str:
    """Where another plan spends the time that the best one saves, most first."""
    mine, theirs = _spent(best.time), _spent(other.time)
    gaps = {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in mine | theirs}
    order = sorted(gaps, key=lambda name: -abs(gaps[name]))
    words = [f"{name} {1e3 * gaps[name]:+.1f} ms" for name in order if abs(gaps[name]) > 5e-5]
    seconds = 1e3 * (other.time.total - best.time.total)
    return f"{describe(other.setup)} takes {seconds:.1f} ms more: {', '.join(words) or 'no term'}"


def _spent(time: StepTime) -> dict[str, float]:
    messages = {f"messages on {axis}": seconds for axis, seconds in time.messages.items()}
    rest = {"compute": time.compute, "bubble": time.bubble, "optimizer": time.optimizer}
    return rest | messages
