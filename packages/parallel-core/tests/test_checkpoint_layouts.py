"""Saved under 20 layouts drawn at random, loaded under 20 others: the same bits, and training
goes on as in one process."""

import os
import random
from pathlib import Path

from torch import Tensor

from fivefold.parallel_core.checkpoint import Checkpoints, load_parts
from fivefold.parallel_core.errors import LayoutError
from fivefold.parallel_core.launcher import launch, rejoin
from fivefold.parallel_core.layout import Layout

from .rig import Case, Record, make_job, parallel_run, worst
from .test_checkpoint import copies, differing, parts_of
from .toy import ToyConfig

RANKS, COUNT = 8, 20
CONFIG = ToyConfig(num_layers=4, num_experts=4, bias=False)


def layouts() -> list[dict[str, int]]:
    """All degrees that 8 ranks and the toy take, in random order; the first 40 of them."""
    found = []
    for tp in (1, 2, 4):
        for cp in (1, 2):
            for pp in (1, 2, 4):
                for ep in (1, 2, 4):
                    for etp in (1, 2):
                        degrees = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
                        try:
                            layout = Layout(RANKS, **degrees)
                        except LayoutError:
                            continue
                        # One sequence in a microbatch, at least as many as there are stages.
                        if 8 // layout.dp >= pp:
                            found.append(degrees)
    random.Random(3).shuffle(found)
    assert len(found) >= 2 * COUNT, len(found)
    return found[: 2 * COUNT]


def case(degrees: dict[str, int]) -> Case:
    return Case(degrees=degrees, config=CONFIG)


def travel(
    folder: Path, first: Path, wholes: dict[str, Tensor], third: Record
) -> tuple[list[str], float, int]:
    changed: list[str] = []
    error, drawn = 0.0, layouts()
    for index, (saving, loading) in enumerate(zip(drawn[:COUNT], drawn[COUNT:], strict=True)):
        job = make_job(case(saving))
        load_parts(first, parts_of(job))
        path = Checkpoints(folder / str(index)).save(2, parts_of(job), {})
        job = make_job(case(loading))
        load_parts(path, parts_of(job))
        changed += [f"{saving} {loading} {name}" for name in differing(job, wholes)]
        if index % 5 == 4:
            job.optimizer.set_steps(2)
            error = max(error, worst(job, parallel_run(job, steps=1), third)[0])
    del job
    rejoin()
    return changed, error, len(os.listdir("/proc/self/task"))


def test_twenty_layouts_to_twenty_others(tmp_path: Path) -> None:
    alone = make_job(Case(degrees={}, config=CONFIG, microbatch_size=8))
    parallel_run(alone, steps=2)
    wholes = copies(alone)
    first = Checkpoints(tmp_path / "first").save(2, parts_of(alone), {})
    third = parallel_run(alone, steps=1)
    for changed, error, threads in launch(
        travel, RANKS, tmp_path, first, wholes, third, timeout=300
    ):
        assert changed == []
        assert error < 1e-12
        # One group has about four; those of all forty layouts would have some hundreds.
        assert threads < 12
