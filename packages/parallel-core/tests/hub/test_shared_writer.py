"""A model over many ranks becomes one folder, and no rank ever holds it."""

import ctypes
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import SafetensorsReader, write_together
from fivefold.parallel_core.launcher import launch

from ..rig import DOUBLE, Case, make_job
from ..toy import ToyConfig

CONFIG = ToyConfig(num_layers=2, num_experts=4)
CASES = [
    Case(degrees={"tp": 2, "pp": 2, "ep": 2}, config=CONFIG, precision=DOUBLE),
    Case(degrees={"tp": 2, "etp": 2, "ep": 2}, config=CONFIG, precision=DOUBLE),
]


def sources(name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Stacks of experts lie on disk one expert at a time."""
    if ".experts." not in name:
        return [(f"model.{name}", ())]
    return [(f"model.{name}.{i}", (i,)) for i in range(shape[0])]


def expected() -> dict[str, Tensor]:
    """What must be on disk, from one process."""
    pieces = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8)).pieces
    return {
        disk: piece.tensor[index].clone()
        for piece in pieces
        for disk, index in sources(piece.name, piece.shape)
    }


def held(folder: Path) -> dict[str, Tensor]:
    with SafetensorsReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in wanted.items()
    )


def write_cases(folder: Path) -> list[list[str]]:
    written = []
    for index, case in enumerate(CASES):
        pieces = make_job(case).pieces
        for size in ("5GB", 2000):
            paths = write_together(folder / f"{index}-{size}", pieces, sources, max_shard_size=size)
            written.append([path.name for path in paths])
        write_together(folder / f"{index}-half", pieces, sources, dtype=torch.bfloat16)
    return written


@pytest.mark.parametrize("size", ["5GB", "2000"])
def test_one_process_writes_the_same(tmp_path: Path, size: str) -> None:
    pieces = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8)).pieces
    write_together(tmp_path, pieces, sources, max_shard_size=size)
    assert same(held(tmp_path), expected())


def test_folders_of_eight_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    written = launch(write_cases, 8, tmp_path, timeout=200)
    assert all(names == written[0] for names in written), "every rank names all files"
    wanted = expected()
    half = {name: tensor.bfloat16() for name, tensor in wanted.items()}
    for index in range(len(CASES)):
        assert same(held(tmp_path / f"{index}-5GB"), wanted)
        assert same(held(tmp_path / f"{index}-2000"), wanted)
        assert same(held(tmp_path / f"{index}-half"), half)
        assert same(load_file(tmp_path / f"{index}-5GB" / "model.safetensors"), wanted)
    many = written[0][1]
    assert len(many) > 8, "more files than ranks"
    assert not list(tmp_path.rglob(".*")), "nothing unfinished is left"


@dataclass
class Held:
    """A piece of a tensor."""

    name: str
    tensor: Tensor
    box: Box
    shape: tuple[int, ...]


RANKS, COUNT, ROWS, WIDTH = 4, 32, 1024, 1024
TENSOR = ROWS * WIDTH * 4  # bytes
KIB = 1024


def own(kind: str) -> list[Held]:
    """A quarter of every tensor: rows of the even ones, columns of the odd ones."""
    rank, pieces = dist.get_rank(), []
    for i in range(COUNT):
        rows = Box((rank * ROWS // RANKS, 0), (ROWS // RANKS, WIDTH))
        columns = Box((0, rank * WIDTH // RANKS), (ROWS, WIDTH // RANKS))
        box = rows if i % 2 == 0 else columns
        tensor = torch.full(box.size, float(i)) + rank / 8
        pieces.append(Held(f"{kind}.{i}", tensor, box, (ROWS, WIDTH)))
    return pieces


def most_resident() -> int:
    """Bytes of this process in memory, at the most, since ``forget_most``."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * KIB


def forget_most() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def give_back_at_once() -> None:
    """Freed memory leaves the process at once: the most resident is then the most held."""
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h; once set, glibc no longer moves it
    assert ctypes.CDLL(None).mallopt(threshold, 64 * KIB) == 1


def memory_of_a_save(folder: Path) -> int:
    give_back_at_once()
    pieces = own("w")
    write_together(folder / "warm", pieces[:4], lambda name, shape: [(name, ())])
    dist.barrier()
    forget_most()
    before = most_resident()
    size = COUNT // RANKS * TENSOR
    write_together(folder / "all", pieces, lambda name, shape: [(name, ())], max_shard_size=size)
    return most_resident() - before


def test_no_rank_holds_more_than_a_few_tensors(tmp_path: Path) -> None:
    grown = launch(memory_of_a_save, RANKS, tmp_path, timeout=200)
    # One tensor, a quarter coming in, and a quarter of one for each of the three other writers.
    assert max(grown) < 2 * TENSOR < COUNT * TENSOR / 10, grown
    found = held(tmp_path / "all")
    assert len(found) == COUNT
    assert found["w.4"][:: ROWS // RANKS, 7].tolist() == [4 + rank / 8 for rank in range(RANKS)]
    assert found["w.5"][7, :: WIDTH // RANKS].tolist() == [5 + rank / 8 for rank in range(RANKS)]


def errors_of_ranks(folder: Path) -> tuple[str, str]:
    texts = []
    pieces = own("w")[:8]
    if dist.get_rank() == 2:
        pieces[3].box = Box((0, 0), (1, 1))
        pieces[3].tensor = torch.zeros(1, 1)
    with pytest.raises(CheckpointError) as caught:
        write_together(folder, pieces, lambda name, shape: [(name, ())])
    texts.append(str(caught.value))
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (TENSOR // 2, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        write_together(
            folder, own("w")[:8], lambda name, shape: [(name, ())], max_shard_size=2 * TENSOR
        )
    return texts[0], str(caught.value)


def test_errors_are_the_same_on_every_rank_and_leave_nothing(tmp_path: Path) -> None:
    found = launch(errors_of_ranks, RANKS, tmp_path, timeout=200)
    assert len(set(found)) == 1
    missing, unwritten = found[0]
    assert re.search(
        r"'w\.3' of shape \(1024, 1024\) has 1048576 elements, the ranks hold", missing
    )
    assert re.search(r"cannot be written to .*File too large", unwritten)
    assert list(tmp_path.iterdir()) == []
