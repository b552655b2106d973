"""How many microbatches each pipeline rank holds at once, read from the schedule itself.

A stage's activations of a microbatch live from its forward until its whole backward is done. Where
the backward is in two parts (zero bubble, arXiv 2401.10241), autograd keeps nearly all of them
until the weights' part, since the inputs of linear layers are what it needs: only what lies between
the stage's output and the last parameter, and the loss, goes with the inputs' part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.distributed.pipelining import schedules

from fivefold.parallel_core.pipeline_config import ONE_STAGE, PipelineConfig

Kind = Literal["F", "B", "I", "W"]
_KINDS: Mapping[str, Kind] = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
}


class Action(NamedTuple):
    """What a rank does with one microbatch of one of its stages.

    Attributes:
        kind: "F" forward, "B" backward, or its parts "I" for the inputs and "W" for the weights.
        stage: index of the stage in the pipeline.
        microbatch: index in the step.
    """

    kind: Kind
    stage: int
    microbatch: int


Order = Sequence[Action]
"""What one rank does in a step, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkBytes:
    """What autograd keeps of one microbatch of a stage.

    Attributes:
        forward: bytes from its forward on.
        after_input: bytes left when its inputs' backward is done and its weights' is not.
    """

    forward: int
    after_input: int


def schedule_orders(
    config: PipelineConfig, num_ranks: int, num_microbatches: int
) -> dict[int, Order]:
    """What every rank of a pipeline would do; needs no process group.

    Args:
        config: the schedule.
        num_ranks: of the pipeline.
        num_microbatches: in a step.

    Raises:
        ConfigError: the schedule cannot deal them out.
    """
    config.check(num_ranks, num_microbatches)
    num_stages = num_ranks * config.stages_per_rank
    # torch's schedules read the shape of the pipeline off the stages of one rank, here the first.
    stages = [
        SimpleNamespace(
            stage_index=config.stage_index(0, part, num_ranks),
            num_stages=num_stages,
            group_rank=0,
            group_size=num_ranks,
            stage_index_to_group_rank={},
            submod=nn.Identity(),
            has_backward=True,
        )
        for part in range(config.stages_per_rank)
    ]
    make: Any = schedules.get_schedule_class(config.schedule)
    of = stages[0] if config.schedule in ONE_STAGE else stages
    return orders_of(make(of, num_microbatches, scale_grads=False))


def orders_of(schedule: Any) -> dict[int, Order]:
    """What every rank does in a step of one of torch's schedules.

    Args:
        schedule: of ``torch.distributed.pipelining``.
    """
    if isinstance(schedule, schedules.PipelineScheduleSingle):
        return _loops(schedule)
    found = getattr(schedule, "pipeline_order_with_comms", None) or schedule.pipeline_order
    return {rank: list(_flat(actions)) for rank, actions in found.items()}


def _loops(schedule: Any) -> dict[int, Order]:
    """What the two schedules of one stage a rank do, which are loops in code.

    The order that they carry is for pictures: in torch 2.13 the last rank's of 1F1B starts at
    microbatch 1.
    """
    num_ranks, count = schedule._num_stages, schedule._n_microbatches
    if isinstance(schedule, schedules.ScheduleGPipe):
        ahead = [count] * num_ranks
    else:
        ahead = [min(count, num_ranks - rank) for rank in range(num_ranks)]
    return {rank: _one_stage(rank, ahead[rank], count) for rank in range(num_ranks)}


def _flat(actions: Iterable[Any]) -> Iterable[Action]:
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield from _flat(action.sub_actions)
        elif action.computation_type.name in _KINDS:
            kind = _KINDS[action.computation_type.name]
            yield Action(kind, action.stage_index, action.microbatch_index)


def _one_stage(stage: int, ahead: int, count: int) -> Order:
    """``ahead`` forwards, then a backward and a forward in turn, then the backwards left."""
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(count):
        actions.append(Action("B", stage, i))
        if ahead + i < count:
            actions.append(Action("F", stage, ahead + i))
    return actions


def most_in_flight(order: Order) -> int:
    """The most microbatches of stages that a rank holds at once, until their backward is whole."""
    one = ChunkBytes(forward=1, after_input=1)
    return peak_bytes(order, {action.stage: one for action in order})


def peak_bytes(order: Order, sizes: Mapping[int, ChunkBytes]) -> int:
    """The most bytes of activations that a rank holds at once.

    Args:
        order: what the rank does.
        sizes: what it keeps of one microbatch, for each of its stages.
    """
    live = peak = 0
    for action in order:
        live += _change(action, sizes[action.stage])
        peak = max(peak, live)
    return peak


def _change(action: Action, size: ChunkBytes) -> int:
    if action.kind == "F":
        return size.forward
    if action.kind == "I":
        # The first stage has no input to find a gradient for, and torch leaves all to the weights.
        return (size.after_input - size.forward) if action.stage > 0 else 0
    if action.kind == "W" and action.stage > 0:
        return -size.after_input
    return -size.forward
