"""Messages of one rank, by collective and axis, in the bytes that ``CommLedger`` counts.

Ring algorithms: all-reduce 2(t-1)/t of the tensor, all-gather and reduce-scatter (t-1)/t of it,
all-to-all the rows for other ranks, send all.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import PARTS, ModelShape, Part
from fivefold.parallel_core.planner.setup import Setup


class Sent(NamedTuple):
    """Calls of a collective and bytes that one rank sends in them."""

    calls: float
    bytes: float


Traffic = dict[tuple[str, str], Sent]
"""By collective and axis, the names of ``CommLedger``."""


def total(several: Iterable[tuple[float, Mapping[tuple[str, str], Sent]]]) -> Traffic:
    """Sum of several, each so many times."""
    found: Traffic = {}
    for times, traffic in several:
        for key, sent in traffic.items():
            old = found.get(key, Sent(0, 0))
            found[key] = Sent(old.calls + times * sent.calls, old.bytes + times * sent.bytes)
    return found


def layer_traffic(model: ModelShape, local: Local, letter: str) -> Traffic:
    """Of one layer for one microbatch, forward and backward, recomputation included.

    The split attention core is the form that gathers keys and values; the experts' rows are as
    evenly spread as ``imbalance`` says.
    """
    several: list[tuple[float, Traffic]] = []
    for part in PARTS[letter]:
        several += [
            (2 if local.recompute == "full" else 1, part_forward(model, local, part)),
            (1, part_backward(model, local, part)),
        ]
    if "attention" in PARTS[letter] and local.recompute == "selective":
        several.append((1, _context_forward(model, local)))
    return total(several)


def part_forward(model: ModelShape, local: Local, part: Part) -> Traffic:
    """Of a part of a layer, forward."""
    if part == "attention":
        return _tensor(model, local, 1) | _context_forward(model, local)
    if part == "moe":
        shared = model.experts and model.experts.shared_ffn
        return (_tensor(model, local, 1) if shared else {}) | _experts(model, local)
    return _tensor(model, local, 1)


def part_backward(model: ModelShape, local: Local, part: Part) -> Traffic:
    """Of a part of a layer, backward; the linear's input is gathered again."""
    if part == "attention":
        return _tensor(model, local, 2) | _context_backward(model, local)
    if part == "moe":
        shared = model.experts and model.experts.shared_ffn
        return (_tensor(model, local, 2) if shared else {}) | _experts(model, local)
    return _tensor(model, local, 2)


def _tensor(model: ModelShape, local: Local, gathers: int) -> Traffic:
    """A pair of column and row linears in one direction (arXiv 2205.05198, section 4.2.2)."""
    if local.tp == 1:
        return {}
    whole = local.element_size * local.tokens * model.hidden * (local.tp - 1) / local.tp
    if not local.sequence:
        return {("all_reduce", "tp"): Sent(1, 2 * whole)}
    return {
        ("all_gather", "tp"): Sent(gathers, gathers * whole),
        ("reduce_scatter", "tp"): Sent(1, whole),
    }


def _context_forward(model: ModelShape, local: Local) -> Traffic:
    """Keys and values of the whole sequence."""
    if local.cp == 1:
        return {}
    return {("all_gather", "cp"): Sent(2, 2 * _keys(model, local))}


def _context_backward(model: ModelShape, local: Local) -> Traffic:
    if local.cp == 1:
        return {}
    return {("reduce_scatter", "cp"): Sent(2, 2 * _keys(model, local))}


def _keys(model: ModelShape, local: Local) -> float:
    heads = max(1, model.kv_heads // local.tp)
    tokens = local.microbatch * local.length
    return local.element_size * tokens * heads * model.head_width * (local.cp - 1) / local.cp


def _experts(model: ModelShape, local: Local) -> Traffic:
    """Dispatch and combine in one direction (arXiv 2504.14960, section 3.2)."""
    if model.experts is None:
        return {}
    sent = local.rows * model.experts.top_k * local.element_size * model.hidden * local.imbalance
    found: Traffic = {}
    if local.ep > 1:
        found["all_to_all", "ep"] = Sent(2, 2 * sent * (local.ep - 1) / local.ep)
    if local.etp > 1:
        away = sent * (local.etp - 1)
        found["all_gather", "etp"] = Sent(1, away)
        found["reduce_scatter", "etp"] = Sent(1, away)
    return found


def boundary_traffic(model: ModelShape, setup: Setup, num_boundaries: int) -> Traffic:
    """What a pipeline rank sends for one microbatch over its boundaries, both ways counted."""
    if not num_boundaries:
        return {}
    size = setup.element_size * Local.of(setup).rows * model.hidden
    if setup.sequence or not setup.split_boundary or setup.tp == 1:
        return {("send", "pp"): Sent(num_boundaries, num_boundaries * size)}
    part = size / setup.tp
    return {
        ("send", "pp"): Sent(num_boundaries, num_boundaries * part),
        ("all_gather", "tp"): Sent(num_boundaries, num_boundaries * (size - part)),
    }


def data_traffic(setup: Setup, dense: int, experts: int) -> Traffic:
    """Gradients and parameters over the data axes, once a step (FSDP gathers for each microbatch).

    Args:
        setup: how data ranks share.
        dense: parameters on this rank before they are shared, without the experts'.
        experts: the experts' parameters.
    """
    axes = (("dp-cp", dense, setup.dp * setup.cp), ("edp", experts, setup.edp))
    return total((1, _data(setup, axis, count, size)) for axis, count, size in axes)


def _data(setup: Setup, axis: str, count: int, num_ranks: int) -> Traffic:
    if num_ranks == 1 or not count:
        return {}
    away = count * (num_ranks - 1) / num_ranks
    form = setup.data.form_of(axis)
    if form == "replicate":
        return {("all_reduce", axis): Sent(1, 2 * away * setup.gradient_size)}
    gathers = _gathers(form, setup)
    return {
        ("reduce_scatter", axis): Sent(1, away * setup.gradient_size),
        ("all_gather", axis): Sent(gathers, gathers * away * setup.weight_size),
    }


def _gathers(form: str, setup: Setup) -> int:
    """How often a step gathers a parameter.

    FSDP shards again after each backward, and under ZeRO-3 after each forward. In a pipeline not
    after backwards: of ZeRO-3's every forward then gathers that follows no backward, and every
    backward that follows a forward, which are one more than the microbatches in any order.
    """
    count = setup.num_microbatches
    if setup.pp > 1:
        return {"zero2": 1, "zero3": count + 1}.get(form, 1)
    return {"zero2": count, "zero3": 2 * count}.get(form, 1)
