"""Messages of a whole step on one rank, as ``CommLedger`` books a run of this project's decoders.

What comes on top of the layers': the embedding, the head and the loss over "tp", sums of the
routers' statistics over "tp-cp", one message of each bucket of the data axes, and one with which
neighbours in a pipeline meet. Tests hold calls and bytes to real runs, to equality.
"""

from fivefold.parallel_core.planner.expert_terms import INDEX
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.memory import stage_parameters, stages_of
from fivefold.parallel_core.planner.models import PARTS, ModelShape
from fivefold.parallel_core.planner.setup import Setup
from fivefold.parallel_core.planner.traffic import (
    Sent,
    Traffic,
    boundary_traffic,
    data_traffic,
    layer_traffic,
    total,
)


def step_traffic(model: ModelShape, setup: Setup, rank: int) -> Traffic:
    """Of a step on a rank of pipeline rank ``rank``; routing is even, as ``imbalance`` says."""
    local, stages = Local.of(setup), stages_of(model, setup, rank)
    last = setup.pp * setup.pipeline.stages_per_rank - 1
    borders = sum((index > 0) + (index < last) for index, _ in stages)
    indices = [index for index, _ in stages]
    letters = "".join(layers for _, layers in stages)
    each = [(1.0, boundary_traffic(model, setup, borders))]
    each += [(letters.count(x), _booked(layer_traffic(model, local, x))) for x in set(letters)]
    each.append((num_routers(letters), _statistics(model, local)))
    each.append((1.0, _ends(model, local, 0 in indices, last in indices)))
    once = [(setup.num_microbatches, total(each)), (1.0, _data(model, setup, rank, letters))]
    if setup.pp > 1:
        # Before the first microbatch neighbours meet: one number over every border.
        once.append((1.0, {("send", "pp"): Sent(borders, 4 * borders)}))
    return {key: sent for key, sent in total(once).items() if sent.calls}


def num_routers(letters: str) -> int:
    """Layers of experts among a stage's."""
    return sum("moe" in PARTS[letter] for letter in letters)


def _booked(traffic: Traffic) -> Traffic:
    """Rows of "etp" travel in all-to-alls, there and back; keys and values in one message."""
    found: Traffic = {}
    for (collective, axis), (calls, size) in traffic.items():
        if axis == "etp":
            old = found.get(("all_to_all", "etp"), Sent(0, 0))
            found["all_to_all", "etp"] = Sent(old.calls + calls, old.bytes + size)
        else:
            found[collective, axis] = Sent(calls / 2 if axis == "cp" else calls, size)
    return found


def _statistics(model: ModelShape, local: Local) -> Traffic:
    """Of each sequence: every expert's copies, and its tokens."""
    num_ranks = local.tp * local.cp
    if num_ranks == 1 or model.experts is None:
        return {}
    size = local.microbatch * (model.experts.num_experts + 1) * INDEX
    times = 2 if local.recompute == "full" else 1
    sent = times * 2 * (num_ranks - 1) / num_ranks * size
    return {("all_reduce", "tp-cp"): Sent(times, sent)}


def _ends(model: ModelShape, local: Local, first: bool, last: bool) -> Traffic:
    """The embedding's rows are summed, the head gathers its input, the loss sums twice."""
    if local.tp == 1:
        return {}
    share = (local.tp - 1) / local.tp
    whole = share * local.element_size * local.tokens * model.hidden
    gathers, scatters = first + 2 * last, first + last
    found: Traffic = {
        ("all_gather", "tp"): Sent(gathers, gathers * whole),
        ("reduce_scatter", "tp"): Sent(scatters, scatters * whole),
    }
    if last:
        numbers = 4 * local.tokens * max(4, local.element_size)
        found["all_reduce", "tp"] = Sent(2, 2 * share * numbers)
    return found


def _data(model: ModelShape, setup: Setup, rank: int, letters: str) -> Traffic:
    """One message for each layer's parameters, and one for those outside of layers."""
    indices = [index for index, _ in stages_of(model, setup, rank)]
    last = setup.pp * setup.pipeline.stages_per_rank - 1
    rest = 0 in indices or last in indices
    buckets = {"dp-cp": len(letters) + rest, "edp": num_routers(letters)}
    traffic = data_traffic(setup, *stage_parameters(model, setup, rank))
    return {
        (collective, axis): Sent(calls * buckets[axis], size)
        for (collective, axis), (calls, size) in traffic.items()
    }
