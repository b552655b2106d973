"""What is to be trained, and every mapping of it that can run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.nearest import is_legal
from fivefold.parallel_core.planner.setup import Recompute, Setup, divisors


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
        tp, cp, pp, ep, etp: the only size to try of an axis; None tries all.
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
    tp: int | None = None
    cp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None

    def sizes(self, axis: str) -> list[int]:
        """Sizes of an axis to try."""
        only: int | None = getattr(self, axis)
        return divisors(self.world_size) if only is None else [only]


def legal_setups(job: Job) -> Iterator[Setup]:
    """Every mapping of a job that can run, whether it fits or not."""
    experts = [(1, 1)]
    if job.model.experts or job.ep or job.etp:
        experts = list(product(job.sizes("etp"), job.sizes("ep")))
    for tp, cp, pp in product(*(job.sizes(axis) for axis in ("tp", "cp", "pp"))):
        if job.world_size % (tp * cp * pp) or pp > job.model.num_layers or job.length % cp:
            continue
        if job.model.num_heads % tp:
            continue
        for etp, ep in experts:
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
        if is_legal(job.model, setup):
            yield setup


def _pipeline(count: int) -> PipelineConfig:
    if count == 1:
        return PipelineConfig()
    return PipelineConfig(schedule="Interleaved1F1B", stages_per_rank=count)
