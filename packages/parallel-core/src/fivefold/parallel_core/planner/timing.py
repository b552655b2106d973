"""Seconds of a step, from FLOPs, messages and the schedule: an estimate, fitted to no run.

Products run at a share of the peak that falls with their smallest dim; each message goes over the
slowest link that its group touches; what is not overlapped is added up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from fivefold.parallel_core.planner.activations import Local
from fivefold.parallel_core.planner.flops import core_flops, model_flops, part_flops, utilisation
from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.memory import stage_parameters, stages_of, telling_ranks
from fivefold.parallel_core.planner.models import PARTS, ModelShape, Part
from fivefold.parallel_core.planner.setup import Setup
from fivefold.parallel_core.planner.traffic import (
    Traffic,
    boundary_traffic,
    data_traffic,
    layer_traffic,
)


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


def step_time(model: ModelShape, setup: Setup, machine: Hardware, causal: bool = False) -> StepTime:
    """Estimate a step; ``setup`` has passed ``check``."""
    count = setup.num_microbatches
    slowest = max(
        telling_ranks(model, setup),
        key=lambda rank: _compute(model, setup, machine, rank, causal),
    )
    compute = count * _compute(model, setup, machine, slowest, causal)
    each, once = _traffic(model, setup, slowest)
    messages = _seconds(each, setup, machine, count)
    ahead = (setup.pp - 1) / setup.pipeline.stages_per_rank
    bubble = (compute + sum(messages.values())) * ahead / count
    for axis, seconds in _seconds(once, setup, machine, 1).items():
        messages[axis] = messages.get(axis, 0.0) + seconds
    optimizer = _optimizer(model, setup, machine, slowest)
    total = compute + sum(messages.values()) + bubble + optimizer
    useful = model_flops(model, setup.length, setup.global_batch, causal)
    mfu = utilisation(useful, total, setup.world_size, machine.flops)
    return StepTime(compute=compute, messages=messages, bubble=bubble, optimizer=optimizer, mfu=mfu)


def _compute(model: ModelShape, setup: Setup, machine: Hardware, rank: int, causal: bool) -> float:
    """Forward and backward of one microbatch on a pipeline rank."""
    local, seconds = Local.of(setup), 0.0
    stages = stages_of(model, setup, rank)
    for _, letters in stages:
        for letter in set(letters):
            each = _layer_seconds(model, local, machine, letter, causal)
            seconds += letters.count(letter) * each
    if stages[-1][0] == setup.pp * setup.pipeline.stages_per_rank - 1:
        flops = 6 * model.hidden * model.vocabulary * local.tokens / local.tp
        smallest = min(local.tokens, model.hidden, model.vocabulary // local.tp)
        seconds += flops / (machine.flops * _reached(machine, smallest))
    return seconds


@lru_cache(maxsize=65536)
def _layer_seconds(
    model: ModelShape, local: Local, machine: Hardware, letter: str, causal: bool
) -> float:
    times = 4 if local.recompute == "full" else 3
    seconds = 0.0
    for part in PARTS[letter]:
        split, smallest, imbalance = _widths(model, local, part)
        rate = machine.flops * _reached(machine, smallest)
        seconds += times * imbalance * local.tokens * part_flops(model, part) / split / rate
        if part == "attention":
            cores = 4 if local.recompute != "none" else 3
            rate = machine.flops * _reached(machine, model.head_width)
            flops = core_flops(model, local.length, causal) * local.tokens / local.tp
            seconds += cores * flops / rate
    return seconds


def _widths(model: ModelShape, local: Local, part: Part) -> tuple[int, float, float]:
    """Ranks that share a part's products, their smallest dim, and how uneven they are."""
    if part == "moe" and model.experts is not None:
        experts = model.experts
        # Tokens are over tp ranks already; etp ranks share the rows that they gather.
        rows = local.tokens // local.tp * experts.top_k * local.ep * local.etp
        smallest = min(rows / experts.num_experts, experts.ffn / local.etp)
        return local.tp, smallest, local.imbalance
    width = model.inner if part == "mlp" else model.num_heads * model.head_width
    return local.tp, min(local.tokens, width // local.tp), 1.0


def _reached(machine: Hardware, smallest: float) -> float:
    smallest = max(smallest, 1.0)
    return machine.efficiency * smallest / (smallest + machine.half_size)


def _traffic(model: ModelShape, setup: Setup, rank: int) -> tuple[Traffic, Traffic]:
    """Messages of a microbatch, and those of the step's end."""
    local = Local.of(setup)
    each: Traffic = {}
    stages = stages_of(model, setup, rank)
    for _, letters in stages:
        for letter in set(letters):
            for key, sent in layer_traffic(model, local, letter).items():
                calls, size = each.get(key, (0.0, 0.0))
                n = letters.count(letter)
                each[key] = type(sent)(calls + n * sent.calls, size + n * sent.bytes)
    last = setup.pp * setup.pipeline.stages_per_rank - 1
    borders = sum((index > 0) + (index < last) for index, _ in stages)
    each |= boundary_traffic(model, setup, borders)
    return each, data_traffic(setup, *stage_parameters(model, setup, rank))


def crosses(setup: Setup, machine: Hardware) -> Callable[[str], bool]:
    """Whether the groups of an axis leave a node, in the order tp, cp, dp, pp."""
    tensor = setup.tp * setup.cp
    reach = {
        "tp": setup.tp,
        "cp": tensor,
        "dp-cp": tensor * setup.dp,
        "etp": setup.etp,
        "ep": setup.etp * setup.ep,
        "edp": setup.etp * setup.ep * setup.edp,
        "pp": setup.world_size,
    }
    return lambda axis: reach[axis] > machine.node_size


def _seconds(traffic: Traffic, setup: Setup, machine: Hardware, times: int) -> dict[str, float]:
    leaves = crosses(setup, machine)
    found: dict[str, float] = {}
    for (_, axis), (calls, size) in traffic.items():
        outside = leaves(axis)
        rate = machine.network_bandwidth if outside else machine.node_bandwidth
        latency = machine.network_latency if outside else machine.node_latency
        found[axis] = found.get(axis, 0.0) + times * (calls * latency + size / rate)
    return found


def _optimizer(model: ModelShape, setup: Setup, machine: Hardware, rank: int) -> float:
    """Its state is read and written, gradients read, weights written, once each."""
    dense, experts = stage_parameters(model, setup, rank)
    whole = setup.data.form == "replicate"
    count = dense if whole else dense / (setup.dp * setup.cp)
    count += experts if setup.data.form_of("edp") == "replicate" else experts / setup.edp
    size = 2 * setup.optimizer_size + setup.gradient_size + setup.weight_size
    return count * size / machine.bandwidth
