"""Checkpoints that are written while training goes on hold the values of the call."""

import contextlib
import resource
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fivefold.parallel_core import checkpoint
from fivefold.parallel_core.box import Box
from fivefold.parallel_core.checkpoint import Checkpoints, Retention, TensorPart, load_parts
from fivefold.parallel_core.checkpoint_files import read_state
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.launcher import launch

RANKS = 4


def whole(value: float) -> dict[str, TensorPart]:
    return {"a": TensorPart(torch.full((5,), value), Box((0,), (5,)), (5,))}


def held(path: Path) -> list[float]:
    parts = whole(-1.0)
    load_parts(path, parts)
    return parts["a"].tensor.tolist()


@contextlib.contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes begin only when the event is set."""
    gate, write = threading.Event(), checkpoint.save

    def wait(*args: Any, **options: Any) -> Any:
        assert gate.wait(60)
        return write(*args, **options)

    monkeypatch.setattr(checkpoint, "save", wait)
    yield gate
    gate.set()


def test_values_are_those_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, parts, state = Checkpoints(tmp_path), whole(1.0), {"note": [1]}
    with held_back(monkeypatch) as gate:
        checkpoints.start(1, parts, state)
        parts["a"].tensor.fill_(2.0)
        state["note"].append(2)
        assert checkpoints.is_busy and checkpoints.steps() == []
        gate.set()
        checkpoints.wait()
    assert not checkpoints.is_busy
    assert held(checkpoints.path(1)) == [1.0] * 5
    assert read_state(checkpoints.path(1))["note"] == [1]


def test_the_next_one_waits_and_takes_its_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, parts = Checkpoints(tmp_path, keep=9), whole(1.0)
    with held_back(monkeypatch) as gate:
        checkpoints.start(1, parts, {})
        threading.Timer(0.1, gate.set).start()
        parts["a"].tensor.fill_(2.0)
        checkpoints.start(2, parts, {})  # its values go where those of step 1 were
        parts["a"].tensor.fill_(3.0)
        checkpoints.save(3, parts, {})
    assert [held(checkpoints.path(step))[0] for step in (1, 2, 3)] == [1.0, 2.0, 3.0]


def test_an_error_is_raised_by_the_next_call_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        checkpoints.start(7, whole(1.0), {})
        with pytest.raises(CheckpointError, match=r"the checkpoint after step 7 cannot be saved"):
            checkpoints.start(8, whole(1.0), {})
    assert not checkpoints.has_failed
    checkpoints.start(8, whole(8.0), {})
    checkpoints.wait()
    assert checkpoints.steps() == [8] and held(checkpoints.path(8)) == [8.0] * 5


def mine(value: float) -> dict[str, TensorPart]:
    rank = dist.get_rank()
    tensor = torch.full((2, 3), value + rank)
    return {"a": TensorPart(tensor, Box((2 * rank, 0), (2, 3)), (2 * RANKS, 3))}


def many_collectives_meanwhile(folder: Path) -> tuple[float, list[list[float]], int]:
    """Save in the background again and again; the main thread uses the world's group."""
    checkpoints, total = Checkpoints(folder, keep=9), torch.zeros(1)
    parts = mine(0.0)
    for step in range(1, 4):
        parts["a"].tensor.copy_(mine(10.0 * step)["a"].tensor)
        checkpoints.start(step, parts, {"step of": step})
        parts["a"].tensor.zero_()
        for _ in range(20):
            dist.all_reduce(total.add_(1))
            total /= RANKS
    checkpoints.wait()
    found = []
    for step in range(1, 4):
        load_parts(checkpoints.path(step), parts)
        found.append(parts["a"].tensor.unique().tolist())
    return total.item(), found, threading.active_count()


def test_ranks_train_on_while_they_write(tmp_path: Path) -> None:
    for rank, (total, found, _) in enumerate(
        launch(many_collectives_meanwhile, RANKS, tmp_path, timeout=200)
    ):
        assert total == 60
        assert found == [[10.0 * step + rank] for step in range(1, 4)]
    assert Checkpoints(tmp_path).damaged() == {}


def one_rank_cannot_write(folder: Path) -> str:
    checkpoints, rank = Checkpoints(folder), dist.get_rank()
    if rank == 2:  # little enough for its tensor, and enough for the store by which ranks meet
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    part = TensorPart(torch.ones(1, 50_000), Box((rank, 0), (1, 50_000)), (RANKS, 50_000))
    checkpoints.start(4, {"a": part}, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    return str(caught.value)


def test_all_ranks_hear_that_one_could_not_write(tmp_path: Path) -> None:
    messages = launch(one_rank_cannot_write, RANKS, tmp_path, timeout=200)
    assert len(set(messages)) == 1
    assert "after step 4 cannot be saved" in messages[0] and "File too large" in messages[0]
    assert list(tmp_path.iterdir()) == []


LOSSES: Mapping[int, float | None] = {1: 2.0, 2: 0.5, 3: None, 4: 0.6, 5: 3.0, 6: 3.0}


def test_retention_is_applied_to_whole_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention(last=1, every=3, best=2))
    for step, loss in LOSSES.items():
        checkpoints.start(step, whole(step), {"heldout_loss": loss})
        checkpoints.wait()
        assert checkpoints.latest() == checkpoints.path(step)
    assert checkpoints.steps() == [2, 3, 4, 6]
    next(checkpoints.path(6).glob("*.distcp")).unlink()
    checkpoints.save(5, whole(5), {})
    assert checkpoints.steps() == [2, 3, 4, 5, 6]
    assert checkpoints.latest() == checkpoints.path(5), "damaged ones do not count as the newest"
