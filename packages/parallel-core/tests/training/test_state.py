"""A run's state in a checkpoint: tensors, the step, what identifies the run, random numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.state import Progress, load_state, save_state

IDENTITY = {"seed": 3, "data": "abc"}


def part(value: float) -> dict[str, TensorPart]:
    """One tensor that this rank holds whole."""
    return {"model.x": TensorPart(torch.full((3,), value), Box.whole((3,)), (3,))}


def draw() -> Tensor:
    """The next random numbers of this rank."""
    return torch.rand(8)


def draws_after(path: Path, topology: Topology) -> Tensor:
    """The random numbers that follow loading."""
    load_state(path, part(0.0), IDENTITY, topology)
    return draw()


def saved_here(folder: Path, step: int = 5, value: float = 1.0) -> Path:
    """A checkpoint of one process whose random state is not that of a fresh one."""
    return save_state(
        Checkpoints(folder), Progress(step, 2), part(value), IDENTITY, Topology.local()
    )


def test_tensors_and_the_step_come_back(tmp_path: Path) -> None:
    path = saved_here(tmp_path, 7, 2.5)
    assert path == Checkpoints(tmp_path).latest()
    parts = part(0.0)
    assert load_state(path, parts, IDENTITY, Topology.local()) == Progress(7, 2)
    assert parts["model.x"].tensor.tolist() == [2.5] * 3


@pytest.mark.parametrize(
    "identity", [{**IDENTITY, "seed": 4}, {**IDENTITY, "data": "abd"}, {**IDENTITY, "more": 1}]
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(
    tmp_path: Path, identity: dict[str, object]
) -> None:
    path, parts = saved_here(tmp_path), part(0.0)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError):
        load_state(path, parts, identity, Topology.local())
    assert parts["model.x"].tensor.tolist() == [0.0] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_go_on_where_they_were_saved(tmp_path: Path) -> None:
    torch.manual_seed(11)
    draw()
    path = saved_here(tmp_path)
    expected = draw()
    assert not torch.equal(draw(), expected)
    assert torch.equal(draws_after(path, Topology.local()), expected)
    torch.manual_seed(99)
    assert torch.equal(draws_after(path, Topology.local()), expected)


def under_two_ranks(one: Path, other: Path, folder: Path) -> dict[str, Tensor]:
    """Random numbers of a rank after loading checkpoints of one process and of these two."""
    topology = Topology(Layout(2))
    torch.manual_seed(20 + topology.world_rank)
    saved = save_state(Checkpoints(folder), Progress(5), part(1.0), IDENTITY, topology)
    found = {"went on": draw()}
    found["same layout"] = draws_after(saved, topology)
    found["one process"] = draws_after(one, topology)
    draw()
    found["one process again"] = draws_after(one, topology)
    found["another step"] = draws_after(other, topology)
    return found


def test_each_rank_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(12)
    one = saved_here(tmp_path / "one")
    followed = draw()
    other = saved_here(tmp_path / "other", step=6)
    results = launch(under_two_ranks, 2, one, other, tmp_path / "two", timeout=60)
    for found in results:
        assert torch.equal(found["same layout"], found["went on"])
        assert torch.equal(found["one process"], found["one process again"]), "deterministic"
        assert not torch.equal(found["one process"], followed)
    streams = [
        tuple(found[name].tolist())
        for found in results
        for name in ("went on", "one process", "another step")
    ]
    assert len(set(streams)) == len(streams), "of every rank and step another one"
