"""What a run learns from is a function of its seed, its step and nothing else."""

from pathlib import Path

import pytest
import torch

from fivefold.fold.data.dataset import Chains
from fivefold.fold.errors import FoldDataError
from fivefold.fold.training.config import DataConfig, RunConfig
from fivefold.fold.training.samples import (
    Sample,
    StepSamples,
    recycles_of,
    split_chains,
    training_samples,
)


def same(one: Sample, other: Sample) -> bool:
    pairs = zip(one.features, other.features, strict=True)
    return (one.number, one.name) == (other.number, other.name) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )


def steps(config: RunConfig, prepared: Path, **options: int) -> StepSamples:
    samples = training_samples(config, Chains(prepared))
    return StepSamples(samples, batch_size=4, most_recycles=2, **options)


def test_threads_and_the_way_to_a_step_change_nothing(config: RunConfig, prepared: Path) -> None:
    plain, ahead = steps(config, prepared), steps(config, prepared, num_workers=2)
    expected = [plain.of(step) for step in range(3)]
    for step in (0, 1, 2, 1):  # the last as after a restart
        found = ahead.of(step)
        assert all(same(a, b) for a, b in zip(found, expected[step], strict=True))
    ahead.close()


def test_ranks_share_the_batch_of_one_process(config: RunConfig, prepared: Path) -> None:
    whole = steps(config, prepared).of(5)
    parts = [steps(config, prepared, rank=rank, size=2).of(5) for rank in range(2)]
    assert all(same(a, b) for a, b in zip(whole, parts[0] + parts[1], strict=True))


def test_recycles_are_uniform_and_alike_in_a_batch(config: RunConfig, prepared: Path) -> None:
    counts = torch.bincount(torch.tensor([recycles_of(1, step, 3) for step in range(4000)]))
    assert len(counts) == 4 and (counts - 1000).abs().max() < 120
    batch = steps(config, prepared).of(2)
    assert {len(sample.features) for sample in batch} == {recycles_of(3, 2, 2) + 1}


def test_held_out_sequences_are_not_learned_from(prepared: Path) -> None:
    chains = Chains(prepared)
    names = [record["name"] for record in chains.records]
    split = split_chains(chains, DataConfig(prepared="", heldout=("1ubq_A",)))
    assert split.heldout == ["1ubq_A"] and split.train == [n for n in names if n != "1ubq_A"]
    with pytest.raises(FoldDataError, match="no chains 9xyz_A"):
        split_chains(chains, DataConfig(prepared="", heldout=("9xyz_A",)))
    with pytest.raises(FoldDataError, match="all are held out"):
        split_chains(chains, DataConfig(prepared="", heldout=tuple(names)))
    every = split_chains(chains, DataConfig(prepared="", heldout_fraction=0.5))
    assert sorted(every.train + every.heldout) == sorted(names)
