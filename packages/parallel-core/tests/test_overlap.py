"""Reductions that begin within backward: in one order, as early as may be, and equal results."""

import dataclasses

import torch

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.overlap import Overlap

from .rig import Case, Job, fresh_topology, make_job, parallel_run
from .toy import ToyConfig


def overlap(started: list[str]) -> Overlap[str]:
    def start(bucket: list[str]) -> str:
        started.append("+".join(bucket))
        return started[-1]

    return Overlap([["c", "d"], ["b"], ["a"]], start)  # type: ignore[arg-type]


def test_a_bucket_starts_when_it_is_whole_and_the_one_before_has_started() -> None:
    started: list[str] = []
    reductions = overlap(started)
    reductions.arm()
    for name, wanted in (("d", []), ("b", []), ("c", ["c+d", "b"]), ("b", ["c+d", "b"])):
        reductions.arrived(name)
        assert started == wanted
    assert list(reductions.finish()) == ["c+d", "b", "a"]
    assert started == ["c+d", "b", "a"]


def test_nothing_starts_before_the_last_backward() -> None:
    started: list[str] = []
    reductions = overlap(started)
    for name in "dcba":
        reductions.arrived(name)
    assert started == []
    rest = reductions.finish()
    assert next(rest) == "c+d"
    assert started == ["c+d"], "one after the other, as they are asked for"
    assert list(rest) == ["b", "a"]
    reductions.arrived("a")
    assert started == ["c+d", "b", "a"], "it has to be armed again"


def test_a_backward_that_failed_leaves_nothing_to_the_next() -> None:
    started: list[str] = []
    reductions = overlap(started)
    reductions.arm()
    for name in "dc":
        reductions.arrived(name)
    reductions.arm()
    assert list(reductions.finish()) == ["c+d", "b", "a"]
    assert started == ["c+d", "c+d", "b", "a"]


# ---- 8 ranks -------------------------------------------------------------------------------

CONFIG = ToyConfig(num_layers=3, num_experts=4)
CASES = [
    Case(degrees=degrees, config=CONFIG, data=DataParallelConfig(form=form, **sizes))  # type: ignore[arg-type]
    for form, sizes in (
        ("replicate", {}),
        ("zero1", {}),
        ("zero1", {"shard_size": 2, "expert_shard_size": 2}),
    )
    for degrees in ({"tp": 2, "ep": 2}, {"pp": 2, "tp": 2})
]


def begun_within_backward(job: Job) -> int:
    """Reductions over the data axes when the gradient of the embedding is there, the last one."""
    counts = [0]
    embedding = job.model.parts[0].embed_tokens
    with CommLedger(job.topology) as ledger:

        def look(_: object) -> None:
            counts[-1] = sum(
                entry.calls
                for (name, axis), entry in ledger.entries.items()
                if axis.startswith(("dp-cp", "edp")) and name != "all_gather"
            )

        if embedding is not None:
            embedding.weight.register_post_accumulate_grad_hook(look)
        job.backward()
    return counts[-1]


def differing(case: Case) -> tuple[list[str], int]:
    """Parameters that overlapping changes, and how many reductions it begins early."""
    topology = fresh_topology(case.degrees)
    plain, early = (make_job(replace_data(case, overlap=o), topology) for o in (False, True))
    runs = [parallel_run(job, steps=2) for job in (plain, early)]
    names = [
        name
        for name, value in runs[0].parameters.items()
        if not torch.equal(value, runs[1].parameters[name])
    ]
    return names, begun_within_backward(early) - begun_within_backward(plain)


def replace_data(case: Case, *, overlap: bool) -> Case:
    return dataclasses.replace(case, data=replace(case.data, overlap=overlap))


def test_overlapping_changes_no_bit_and_begins_before_backward_ends() -> None:
    """All buckets: of three layers, dense and experts, and the rest, which the embedding ends."""
    ranks = launch(lambda: [differing(case) for case in CASES], 8, timeout=300)
    for rank, found in enumerate(ranks):
        assert [names for names, _ in found] == [[]] * len(CASES), rank
        for case, (_, early) in zip(CASES, found, strict=True):
            assert early == (0 if "pp" in case.degrees else 2 * CONFIG.num_layers + 1), (rank, case)
