"""Damage of every kind is found and named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart, load_parts
from fivefold.parallel_core.checkpoint_files import STATE, damage, damage_inside, describe
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.launcher import launch


def part(rank: int = 0, size: int = 1) -> dict[str, TensorPart]:
    """A row of a matrix on each rank."""
    tensor = torch.full((1, 64), float(rank))
    return {"a": TensorPart(tensor, Box((rank, 0), (1, 64)), (size, 64))}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    for step in (1, 2):
        checkpoints.save(step, part(), {})
    return checkpoints


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert describe(tmp_path, ["x"]) == {"x": {"bytes": 3, "sha256": digest}}


def test_every_file_of_a_checkpoint_is_described(saved: Checkpoints) -> None:
    path = saved.path(2)
    files = json.loads((path / STATE).read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {STATE}
    assert damage_inside(path) == ""
    assert saved.latest(contents=True) == path


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_one_changed_bit_is_found_and_named(saved: Checkpoints, pattern: str) -> None:
    (file,) = saved.path(2).glob(pattern)
    flip(file)
    assert damage(saved.path(2)) == "", "its size has not changed"
    assert damage_inside(saved.path(2)).startswith(f"{file} is corrupt: its SHA-256 is ")
    assert saved.latest() == saved.path(2)
    assert saved.latest(contents=True) == saved.path(1)
    flip(next(saved.path(1).glob(pattern)))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint: step 1: .*corrupt.*step 2"):
        saved.latest(contents=True)


def truncate(file: Path) -> None:
    os.truncate(file, 10)


@pytest.mark.parametrize(("harm", "words"), [(truncate, "has 10 bytes"), (os.unlink, "is missing")])
def test_sizes_are_looked_at_first(
    saved: Checkpoints, harm: Callable[[Path], None], words: str
) -> None:
    file = next(saved.path(2).glob("*.distcp"))
    harm(file)
    for look in (damage, damage_inside):
        assert look(saved.path(2)).startswith(f"{file} {words}; it was saved with ")


def test_checkpoints_without_digests_are_read(saved: Checkpoints) -> None:
    state = saved.path(2) / STATE
    plain = json.loads(state.read_text())
    plain["files"] = {name: described["bytes"] for name, described in plain["files"].items()}
    state.write_text(json.dumps(plain))
    assert saved.latest(contents=True) == saved.path(2)
    load_parts(saved.path(2), part())


def on_ranks(folder: Path) -> tuple[str, str]:
    checkpoints = Checkpoints(folder)
    path = checkpoints.save(1, part(dist.get_rank(), dist.get_world_size()), {})
    before = damage_inside(path)
    dist.barrier()
    if dist.get_rank() == 0:
        flip(path / "__2_0.distcp")
    dist.barrier()
    return before, damage_inside(path)


def test_ranks_share_the_reading_and_all_hear_of_it(tmp_path: Path) -> None:
    found = launch(on_ranks, 3, tmp_path, timeout=120)
    assert len(set(found)) == 1
    before, after = found[0]
    assert before == ""
    assert "__2_0.distcp is corrupt" in after and ";" not in after
