"""A stage's output is freed when it is sent, and backward does not notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fivefold.parallel_core import stage as stage_module
from fivefold.parallel_core.in_flight import schedule_orders
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.pipeline_config import SCHEDULES
from fivefold.parallel_core.stage import Stage, border, let_go

from .gpt import B, H, S
from .gpt_stages import Pipeline, config_of

BOUNDARY = B * S * H * 8

# ---- one tensor ----------------------------------------------------------------------------


def test_a_border_gives_the_same_values_contiguous_in_both_directions() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = border(x.t())
    assert y.is_contiguous() and not y._is_view() and torch.equal(y, x.t())
    (grad,) = torch.autograd.grad(y, x, torch.ones(1).expand(4, 3))
    assert torch.equal(grad, torch.ones(3, 4))
    whole = x * 2
    assert border(whole).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 2)])
def test_letting_go_frees_the_data_and_keeps_the_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = border(x * 2)
    storage = StorageWeakRef(y.untyped_storage())
    let_go(y)
    assert storage.expired()
    assert y.shape == shape
    y.backward(torch.full(shape, 3.0))
    assert torch.equal(x.grad, torch.full(shape, 6.0))


class SavesItsOutput(nn.Module):
    """Keeps its result, and the result as the input of something else, for backward."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.tanh()
        return y, y.square().sum()


def test_what_autograd_saved_of_an_output_stays() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    grad = torch.randn(3, 4)
    found = []
    for free in (False, True):
        y, side = SavesItsOutput()(x)
        out = border(y)
        storage = StorageWeakRef(y.untyped_storage())
        del y
        if free:
            let_go(out)
        assert not storage.expired()
        found.append(torch.autograd.grad([out, side], x, [grad, None]))
    assert torch.equal(found[0][0], found[1][0])


# ---- real steps ----------------------------------------------------------------------------


class Watch:
    """Bytes of outputs, and received tensors, that are alive before each action of this rank."""

    def __init__(self, pipeline: Pipeline):
        self.outputs: list[int] = []
        self.rooms: list[int] = []
        self._made: list[tuple[StorageWeakRef, int]] = []
        self._pipeline = pipeline
        local = set(pipeline.stages)
        for part, stage in zip(pipeline.parts, pipeline.stages, strict=True):
            # What stays on this rank is the next stage's input, and has to live as long as it.
            if stage < pipeline.num_stages - 1 and stage + 1 not in local:
                part.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, out: Tensor) -> None:
        storage = out.untyped_storage()
        self._made.append((StorageWeakRef(storage), storage.nbytes()))

    def look(self) -> None:
        self.outputs.append(sum(n for storage, n in self._made if not storage.expired()))
        schedule = self._pipeline.runner.schedule
        stages = getattr(schedule, "_stages", None) or [schedule._stage]
        infos = [
            i for s in stages for d in (s.args_recv_info, s.grad_recv_info) for i in d.values()
        ]
        self.rooms.append(sum(info.buffer is not None for row in infos for info in row))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Look before every action; messages are copies, for gloo holds them to the step's end."""
    kept = {name: getattr(Stage, name) for name in ("forward_one_chunk", "backward_one_chunk")}
    send = Stage.get_fwd_send_ops

    def looking(name: str) -> Any:
        def run(self: Stage, *args: Any, **kwargs: Any) -> Any:
            watch.look()
            return kept[name](self, *args, **kwargs)

        return run

    def send_copies(self: Stage, chunk: int) -> Any:
        ops = send(self, chunk)
        for op in ops:
            op.tensor = op.tensor.clone()
        return ops

    for name in kept:
        setattr(Stage, name, looking(name))
    Stage.get_fwd_send_ops = send_copies  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Stage, name, method)
        Stage.get_fwd_send_ops = send  # type: ignore[method-assign]


def steps(schedule: str, num_ranks: int) -> tuple[bool, list[int], list[int], list[int]]:
    """Equal gradients?, bytes of outputs without and with freeing, and rooms for messages."""
    pipeline = Pipeline(config_of(schedule), num_ranks, 2 * num_ranks)
    free, results, watches = stage_module.let_go, [], []
    for method in (lambda _: None, free):
        stage_module.let_go = method
        pipeline.step()
        watches.append(Watch(pipeline))
        with watched(watches[-1]):
            results.append(pipeline.step())
    stage_module.let_go = free
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return same, watches[0].outputs, watches[1].outputs, watches[1].rooms


def sent_in_flight(schedule: str, num_ranks: int, rank: int) -> list[int]:
    """Microbatches of stages whose output went to another rank, before each action."""
    config, last = config_of(schedule), num_ranks * config_of(schedule).stages_per_rank - 1
    order = schedule_orders(config, num_ranks, 2 * num_ranks)[rank]
    here = {action.stage for action in order}
    live, seen = 0, []
    for action in order:
        if action.kind != "W":
            seen.append(live)
        if action.stage < last and action.stage + 1 not in here:
            # torch keeps an output for the weights' part too, though that does not use it.
            live += {"F": 1, "I": 0}.get(action.kind, -1)
    return seen


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_of_everything_in_flight_are_freed_and_gradients_are_bitwise_equal(
    schedule: str,
) -> None:
    ranks = launch(steps, 4, schedule, 4, timeout=300)
    for rank, (same, kept, freed, rooms) in enumerate(ranks):
        assert same
        # Appendix B: b·s·h elements for each microbatch of a stage that is in flight.
        assert kept == [BOUNDARY * count for count in sent_in_flight(schedule, 4, rank)]
        # DualPipeV sends a forward's output when the backward that it overlaps is done.
        assert max(freed) <= BOUNDARY * (schedule == "DualPipeV")
        # For what is on its way, of 8 microbatches of up to 2 stages in 2 directions.
        assert max(rooms) <= (8 if schedule == "LoopedBFS" else 4)


def test_1f1b_saves_what_appendix_b_says() -> None:
    """2sbhr bytes, r = p - i microbatches in flight on rank i; nothing on the last rank."""
    for rank in range(4):
        expected = BOUNDARY * (4 - rank if rank < 3 else 0)
        assert max(sent_in_flight("1F1B", 4, rank)) * BOUNDARY == expected
