"""Seconds of one layer for one microbatch: kernels, and the messages that nothing hides.

In backward the gather of a column-parallel linear's input runs beside the product for its input's
gradient, and the sum of that gradient beside the product for its weight's (arXiv 2205.05198,
section 4.2.2); what is longer than the product remains.
"""

from dataclasses import dataclass
from functools import lru_cache

from fivefold.parallel_core.planner.hardware import Hardware
from fivefold.parallel_core.planner.kernels import (
    Gemm,
    backward_seconds,
    gemm_seconds,
    traffic_seconds,
)
from fivefold.parallel_core.planner.links import Reach, seconds
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import PARTS, ModelShape, Part
from fivefold.parallel_core.planner.traffic import Traffic, part_backward, part_forward
from fivefold.parallel_core.planner.work import Work, part_work

Reaches = tuple[tuple[str, Reach], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """Seconds.

    Attributes:
        forward, backward: of kernels; what is recomputed is part of backward.
        messages: by axis, forward and backward, as far as nothing hides them.
        backward_messages: of these, those of backward.
    """

    forward: float
    backward: float
    messages: dict[str, float]
    backward_messages: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + sum(self.messages.values())


@lru_cache(maxsize=65536)
def layer_time(
    model: ModelShape,
    local: Local,
    machine: Hardware,
    letter: str,
    reaches: Reaches,
) -> LayerTime:
    """Of a layer of one kind; ``reaches`` are the groups of the axes."""
    forward = backward = 0.0
    sent: dict[str, float] = {}
    sent_back: dict[str, float] = {}
    groups = dict(reaches)
    for part in PARTS[letter]:
        work = part_work(model, local, part)
        there, back, core = _kernels(work, machine, local)
        forward += there
        backward += back + {"none": 0.0, "selective": core, "full": there}[local.recompute]
        first = _sum(part_forward(model, local, part), machine, groups)
        _add(sent, first)
        _add(sent_back, _backward(model, local, part, work, machine, groups))
        if local.recompute == "full":
            _add(sent_back, first)
        elif local.recompute == "selective" and "cp" in first:
            _add(sent_back, {"cp": first["cp"]})
    _add(sent, sent_back)
    return LayerTime(forward=forward, backward=backward, messages=sent, backward_messages=sent_back)


def _kernels(work: Work, machine: Hardware, local: Local) -> tuple[float, float, float]:
    """Forward, backward, and forward of the core alone."""
    e = local.element_size

    def products(gemms: tuple[Gemm, ...]) -> float:
        return sum(gemm_seconds(machine, gemm, e) for gemm in gemms)

    def backwards(gemms: tuple[Gemm, ...]) -> float:
        return sum(sum(backward_seconds(machine, gemm, e)) for gemm in gemms)

    linears, scores = products(work.into + work.others), products(work.core)
    fused = work.fused_flops / (machine.flops * machine.attention_efficiency)
    core = scores + fused + traffic_seconds(machine, work.core_forward_bytes)
    forward = linears + core + traffic_seconds(machine, work.forward_bytes)
    moved = traffic_seconds(machine, work.backward_bytes + work.core_backward_bytes)
    # A fused backward makes the scores again: five products instead of two (arXiv 2205.14135).
    backward = backwards(work.into + work.others + work.core) + 2.5 * fused + moved
    return forward, backward, core


def _sum(traffic: Traffic, machine: Hardware, groups: dict[str, Reach]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (collective, axis), (calls, size) in traffic.items():
        _add(found, {axis: seconds(machine, collective, groups[axis], calls, size)})
    return found


def _backward(
    model: ModelShape,
    local: Local,
    part: Part,
    work: Work,
    machine: Hardware,
    groups: dict[str, Reach],
) -> dict[str, float]:
    """Of a part, less what hides behind the products of its column-parallel linear."""
    traffic = part_backward(model, local, part)
    hiding = 0.0
    for gemm in work.into:
        hiding += min(backward_seconds(machine, gemm, local.element_size))
    found = _sum({key: s for key, s in traffic.items() if key[1] != "tp"}, machine, groups)
    for (collective, axis), (calls, size) in traffic.items():
        if axis == "tp":
            each = seconds(machine, collective, groups[axis], 1, size / calls)
            _add(found, {axis: (calls - 1) * each + max(0.0, each - hiding)})
    return found


def _add(to: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        to[name] = to.get(name, 0.0) + value
