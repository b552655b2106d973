"""The batches of a run's text."""

import math
from pathlib import Path

import pytest
import torch

from fivefold.parallel_core.config import override
from fivefold.parallel_core.documents import starts_after
from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.run import load_text_run
from fivefold.parallel_core.training.run_batches import (
    check_text,
    heldout_batches,
    in_bits,
    place_of,
    training_batches,
)
from fivefold.parallel_core.training.tokens import TokenDataset

from ..imagined import imagined
from .text_runs import ToyRun, written


@pytest.fixture
def run(tmp_path: Path) -> ToyRun:
    return load_text_run(ToyRun, written(tmp_path))


def text_of(run: ToyRun) -> TokenDataset:
    return run.data.prepare(run.data.load_tokenizer())


def test_a_rank_s_place() -> None:
    topology = imagined(8, tp=2, cp=2)[6]
    assert place_of(topology) == {"dp_rank": 1, "dp_size": 2, "cp_rank": 1, "cp_size": 2}


def test_text_that_is_too_short(run: ToyRun) -> None:
    dataset = text_of(run)
    check_text(run.training, dataset)
    with pytest.raises(DataError, match="do not fill one window"):
        check_text(override(run, {"training.sequence_length": "5000"}).training, dataset)


@pytest.mark.parametrize("make", [training_batches, heldout_batches])
def test_documents_are_told_apart_on_request(run: ToyRun, make: type) -> None:
    dataset, topology = text_of(run), Topology.local()
    together = make(run.training, dataset, topology, "contiguous")
    apart = make(run.training, dataset, topology, "contiguous", separate_documents=True)
    bordered = 0
    for step in range(4):
        inputs, targets, starts = apart.batch(step)
        assert all(map(torch.equal, together.batch(step), (inputs, targets)))
        assert torch.equal(starts, starts_after(inputs, dataset.end_of_text_id))
        bordered += int(starts.gt(0).any())
    assert bordered > 0


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_parts_of_a_sequence_say_where_whole_documents_start(run: ToyRun, split: str) -> None:
    dataset = text_of(run)
    options = {"separate_documents": True}
    whole = training_batches(run.training, dataset, Topology.local(), "contiguous", **options)
    parts = [
        training_batches(run.training, dataset, topology, split, **options)
        for topology in imagined(2, cp=2)
    ]
    order = {"contiguous": [0, 1, 2, 3], "zigzag": [0, 3, 1, 2]}[split]
    for step in range(4):
        wanted = [x.view(2, 4, 4)[:, order].view(2, 16) for x in whole.batch(step)]
        found = zip(*(part.batch(step) for part in parts), strict=True)
        for mine, expected in zip(found, wanted, strict=True):
            assert torch.equal(torch.cat(mine, 1), expected)


def test_no_heldout_text_gives_no_batches(run: ToyRun) -> None:
    none = override(run, {"data.heldout_fraction": "0"})
    assert heldout_batches(none.training, text_of(none), Topology.local(), "contiguous") == ()


def test_losses_in_bits_a_byte(run: ToyRun) -> None:
    dataset, told = text_of(run), []
    in_bits(lambda step, found: told.append((step, found)), dataset)(3, {"loss": 2.0, "norm": 1.0})
    tokens, num_bytes = dataset.num_tokens("train"), dataset.num_bytes["train"]
    (step, found) = told[0]
    assert step == 3
    assert found == {
        "loss": 2.0,
        "norm": 1.0,
        "bits_per_byte": pytest.approx(2.0 / math.log(2) * tokens / num_bytes),
    }
