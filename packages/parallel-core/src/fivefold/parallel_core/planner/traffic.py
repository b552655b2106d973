"""Messages of one rank, by collective and axis, in the bytes that ``CommLedger`` counts.

Ring algorithms: all-reduce 2(t-1)/t of the tensor, all-gather and reduce-scatter (t-1)/t of it,
all-to-all the rows for other ranks, send all.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fivefold.parallel_core.planner.activations import Local
from fivefold.parallel_core.planner.models import PARTS, ModelShape
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
    """Of one layer for one microbatch, forward and backward.

    The split attention core is the form that gathers keys and values; the experts' rows are as
    evenly spread as ``imbalance`` says.
    """
    parts = PARTS[letter]
    several = [(len(parts), _tensor(model, local))] if local.tp > 1 else []
    if "attention" in parts and local.cp > 1:
        several.append((1, _context(model, local)))
    if "moe" in parts:
        # The dense MLP's collectives are the shared expert's here, if there is one.
        if local.tp > 1 and not (model.experts and model.experts.shared_ffn):
            several.append((-1, _tensor(model, local)))
        several.append((1, _experts(model, local)))
    return {key: sent for key, sent in total(several).items() if sent.calls}


def _times(local: Local) -> int:
    """Forwards of a layer."""
    return 2 if local.recompute == "full" else 1


def _tensor(model: ModelShape, local: Local) -> Traffic:
    """A pair of column and row linears (arXiv 2205.05198, section 4.2.2), with gathers again."""
    whole = local.element_size * local.tokens * model.hidden * (local.tp - 1) / local.tp
    forwards = _times(local)
    if not local.sequence:
        calls = forwards + 1
        return {("all_reduce", "tp"): Sent(calls, 2 * calls * whole)}
    gathers, scatters = forwards + 2, forwards + 1
    return {
        ("all_gather", "tp"): Sent(gathers, gathers * whole),
        ("reduce_scatter", "tp"): Sent(scatters, scatters * whole),
    }


def _context(model: ModelShape, local: Local) -> Traffic:
    heads = max(1, model.kv_heads // local.tp)
    tokens = local.microbatch * local.length
    bytes_ = local.element_size * tokens * heads * model.head_width * (local.cp - 1) / local.cp
    forwards = 1 if local.recompute == "none" else 2
    return {
        ("all_gather", "cp"): Sent(2 * forwards, 2 * forwards * bytes_),
        ("reduce_scatter", "cp"): Sent(2, 2 * bytes_),
    }


def _experts(model: ModelShape, local: Local) -> Traffic:
    """Dispatch and combine, forward and backward (arXiv 2504.14960, section 3.2)."""
    if model.experts is None:
        return {}
    sent = local.rows * model.experts.top_k * local.element_size * model.hidden * local.imbalance
    calls = _times(local) + 1
    found: Traffic = {}
    if local.ep > 1:
        away = sent * (local.ep - 1) / local.ep
        found["all_to_all", "ep"] = Sent(2 * calls, 2 * calls * away)
    if local.etp > 1:
        away = sent * (local.etp - 1)
        found["all_gather", "etp"] = Sent(calls, calls * away)
        found["reduce_scatter", "etp"] = Sent(calls, calls * away)
    return found


def boundary_traffic(model: ModelShape, setup: Setup, num_boundaries: int) -> Traffic:
    """What a pipeline rank sends for one microbatch over its boundaries, both ways counted."""
    if not num_boundaries:
        return {}
    size = setup.element_size * Local.of(setup).rows * model.hidden
    return {("send", "pp"): Sent(num_boundaries, num_boundaries * size)}


def data_traffic(setup: Setup, dense: int, experts: int) -> Traffic:
    """Gradients and parameters over the data axes, once a step (ZeRO-3: once a microbatch more).

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
    gathers = 2 * setup.num_microbatches if form == "zero3" else 1
    return {
        ("reduce_scatter", axis): Sent(1, away * setup.gradient_size),
        ("all_gather", axis): Sent(gathers, gathers * away * setup.weight_size),
    }
