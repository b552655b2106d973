"""Seconds of a step, from kernels, messages and the schedule: an estimate.

A pipeline rank works through its microbatches one after another, and waits for the other ranks as
long as they take to fill and to drain the pipeline. What is not hidden is added up.
"""

from dataclasses import dataclass

from fivefold.parallel_core.data_parallel_config import WHOLE
from fivefold.parallel_core.planner.flops import model_flops, utilisation
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.kernels import (
    Gemm,
    backward_seconds,
    gemm_seconds,
    traffic_seconds,
)
from fivefold.parallel_core.planner.layer_time import layer_time
from fivefold.parallel_core.planner.links import reaches, seconds
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.memory import stage_parameters, stages_of, telling_ranks
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.setup import Setup
from fivefold.parallel_core.planner.traffic import Traffic, boundary_traffic, data_traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """A step of the slowest pipeline rank, in seconds.

    Attributes:
        compute: products of matrices.
        messages: by axis, those of all microbatches and of the step's end.
        bubble: waiting for other pipeline ranks.
        optimizer: reading and writing what is trained.
        mfu: share of the peak that useful FLOPs reach.
    """

    compute: float
    messages: dict[str, float]
    bubble: float
    optimizer: float
    mfu: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + sum(self.messages.values()) + self.bubble + self.optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTime:
    """Seconds of one microbatch on one pipeline rank: kernels, and messages by axis."""

    compute: float
    messages: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + sum(self.messages.values())


def step_time(model: ModelShape, setup: Setup, machine: Hardware, causal: bool = False) -> StepTime:
    """Estimate a step; ``setup`` has passed ``check``.

    Args:
        model: what is trained.
        setup: how.
        machine: on what.
        causal: MFU counts half of attention's FLOPs; the time is the same.
    """
    count = setup.num_microbatches
    ranks = telling_ranks(model, setup)
    times = {rank: rank_time(model, setup, machine, rank) for rank in ranks}
    slowest = max(times, key=lambda rank: times[rank].total)
    each = times[slowest]
    messages = {axis: count * sent for axis, sent in each.messages.items()}
    # The others fill and drain the pipeline, each with one of its stages.
    others = min(time.total for time in times.values())
    bubble = (setup.pp - 1) * others / setup.pipeline.stages_per_rank
    once = data_traffic(setup, *stage_parameters(model, setup, slowest))
    for axis, sent in _left(setup, each.compute, _seconds(once, setup, machine)).items():
        messages[axis] = messages.get(axis, 0.0) + sent
    optimizer = _optimizer(model, setup, machine, slowest)
    compute = count * each.compute
    total = compute + sum(messages.values()) + bubble + optimizer
    useful = model_flops(model, setup.length, setup.global_batch, causal)
    mfu = utilisation(useful, total, setup.world_size, machine.flops)
    return StepTime(compute=compute, messages=messages, bubble=bubble, optimizer=optimizer, mfu=mfu)


def _left(setup: Setup, microbatch: float, sent: dict[str, float]) -> dict[str, float]:
    """Of the messages of the data axes, what kernels do not hide.

    FSDP gathers ahead beside the kernels of every microbatch. Of whole parameters, a stage's
    gradients are ready, and its weights needed, while pp microbatches of each other stage of the
    rank are still to come, or have gone before; the last stage's hide beside one of its own.
    """
    parts, whole = setup.pipeline.stages_per_rank, sum(sent.values())
    if setup.data.form not in WHOLE:
        left = whole - microbatch * setup.num_microbatches
    elif setup.data.overlap:
        window = microbatch * (1 + setup.pp * (parts - 1)) / parts
        left = max((whole - microbatch) / parts, whole - window)
    else:
        left = whole
    return {axis: each * max(0.0, left) / whole for axis, each in sent.items() if each}


def rank_time(model: ModelShape, setup: Setup, machine: Hardware, rank: int) -> RankTime:
    """Forward and backward of one microbatch on a pipeline rank."""
    local, stages = Local.of(setup), stages_of(model, setup, rank)
    groups = tuple(reaches(setup, machine.node_size).items())
    letters = "".join(letters for _, letters in stages)
    last = setup.pp * setup.pipeline.stages_per_rank - 1
    compute = _head(model, local, machine) if stages[-1][0] == last else 0.0
    messages: dict[str, float] = {}
    for letter in set(letters):
        layer = layer_time(model, local, machine, letter, groups)
        times = letters.count(letter)
        compute += times * (layer.forward + layer.backward)
        for axis, sent in layer.messages.items():
            messages[axis] = messages.get(axis, 0.0) + times * sent
    compute += _accumulation(model, setup, machine, rank)
    borders = sum((index > 0) + (index < last) for index, _ in stages)
    for axis, sent in _seconds(boundary_traffic(model, setup, borders), setup, machine).items():
        left = max(0.0, sent - compute) if axis == "pp" and setup.overlap_sends else sent
        messages[axis] = messages.get(axis, 0.0) + left
    return RankTime(compute=compute, messages=messages)


def _accumulation(model: ModelShape, setup: Setup, machine: Hardware, rank: int) -> float:
    """Gradients of a microbatch are added to those of the others: read and written."""
    return traffic_seconds(
        machine, 2 * setup.gradient_size * sum(stage_parameters(model, setup, rank))
    )


def _head(model: ModelShape, local: Local, machine: Hardware) -> float:
    """Logits and their loss; float32 logits are written, read twice, and read and written back."""
    width = model.vocabulary // local.tp
    product = Gemm(local.tokens, width, model.hidden)
    forward = gemm_seconds(machine, product, local.element_size)
    backward = sum(backward_seconds(machine, product, local.element_size))
    return forward + backward + traffic_seconds(machine, 5 * 4 * local.tokens * width)


def _seconds(traffic: Traffic, setup: Setup, machine: Hardware) -> dict[str, float]:
    groups = reaches(setup, machine.node_size)
    found: dict[str, float] = {}
    for (collective, axis), (calls, size) in traffic.items():
        sent = seconds(machine, collective, groups[axis], calls, size)
        found[axis] = found.get(axis, 0.0) + sent
    return found


def _optimizer(model: ModelShape, setup: Setup, machine: Hardware, rank: int) -> float:
    """Adam on its state, and passes over gradients: clear, unscale, measure, clip.

    Unscaling and clipping read and write; weights are written from main weights, read once more.
    """
    dense, experts = stage_parameters(model, setup, rank)
    whole = setup.data.form == "replicate"
    count = dense if whole else dense / (setup.dp * setup.cp)
    count += experts if setup.data.form_of("edp") == "replicate" else experts / setup.edp
    size = 2 * setup.optimizer_size + setup.gradient_size + 4 + setup.weight_size
    passes = 6 * setup.gradient_size * (dense + experts)
    return traffic_seconds(machine, count * size + passes)
