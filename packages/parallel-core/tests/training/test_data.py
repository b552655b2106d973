"""Batches: exact windows, the same under every layout, resumed at any step."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.errors import ConfigError, DataError
from fivefold.parallel_core.sequence_split import held
from fivefold.parallel_core.training.data import EvaluationBatches, TextBatches
from fivefold.parallel_core.training.tokenizer import ByteTokenizer
from fivefold.parallel_core.training.tokens import prepare

TOKENS = np.arange(1003, dtype=np.uint16)  # the token is its position


class Recorded:
    """Tokens that note which of them were read."""

    def __init__(self) -> None:
        self.windows: list[slice] = []

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, window: slice) -> np.ndarray:
        self.windows.append(window)
        return TOKENS[window]


def training(**options: object) -> TextBatches:
    defaults = {"tokens": TOKENS, "sequence_length": 8, "global_batch_size": 12, "seed": 1}
    return TextBatches(**(defaults | options))  # type: ignore[arg-type]


def evaluation(**options: object) -> EvaluationBatches:
    defaults = {"tokens": TOKENS, "sequence_length": 8, "global_batch_size": 12}
    return EvaluationBatches(**(defaults | options))  # type: ignore[arg-type]


def joined(parts: list[list[Tensor]]) -> Tensor:
    """Global batch from parts[dp_rank][cp_rank]."""
    return torch.cat([torch.cat(row, dim=1) for row in parts])


def test_rows_are_windows_and_targets_the_next_token() -> None:
    batches = training()
    inputs_bs, targets_bs = batches.batch(3)
    assert inputs_bs.dtype == targets_bs.dtype == torch.int64
    assert inputs_bs.shape == targets_bs.shape == (12, 8)
    starts = torch.from_numpy(batches.windows(3)) * 8
    assert torch.equal(inputs_bs, starts[:, None] + torch.arange(8))
    assert torch.equal(targets_bs, inputs_bs + 1)


def test_each_epoch_visits_every_window_once_in_its_own_order() -> None:
    batches = training()
    assert batches.num_windows == 125
    visited = np.concatenate([batches.windows(step) for step in range(125)])
    epochs = visited.reshape(12, 125)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(125))
    for one, other in itertools.combinations(epochs, 2):
        assert (one == other).sum() < 10
    assert batches.epoch(125) == 12.0
    assert not np.array_equal(training(seed=2).windows(0), batches.windows(0))


@pytest.mark.parametrize(("dp_size", "cp_size"), [(1, 2), (2, 1), (3, 4), (12, 8), (4, 2)])
def test_the_global_batch_is_the_same_under_every_layout(dp_size: int, cp_size: int) -> None:
    whole = training()
    for step in (0, 9, 10, 11, 1000):  # an epoch ends inside step 10
        parts = [
            [
                training(dp_rank=d, dp_size=dp_size, cp_rank=c, cp_size=cp_size).batch(step)
                for c in range(cp_size)
            ]
            for d in range(dp_size)
        ]
        assert parts[0][0][0].shape == (12 // dp_size, 8 // cp_size)
        for side in (0, 1):
            assert torch.equal(
                joined([[p[side] for p in row] for row in parts]), whole.batch(step)[side]
            )


TEXTS = [np.array([*range(1, n), 0]) for n in (5, 1, 11, 2, 30, 3, 3, 9) * 8]


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_batches_say_where_documents_start(cp_size: int, split: str) -> None:
    """The n-th token of a document is n, and its last is 0."""
    whole = np.concatenate(TEXTS)
    options = {"tokens": whole, "end_of_text_id": 0, "cp_size": cp_size, "split": split}
    for make in (training, evaluation):
        for rank in range(cp_size):
            batches = make(cp_rank=rank, **options)
            inputs, targets, starts = batches.batch(1)
            without = make(cp_rank=rank, **options | {"end_of_text_id": None}).batch(1)
            assert torch.equal(inputs, without[0])
            assert torch.equal(targets, without[1])
            positions = torch.tensor([p for at in held(8, cp_size, rank, split) for p in at])
            assert starts.shape == inputs.shape
            assert starts.ge(0).all()
            assert starts.le(positions).all()
            # A document that began in the window counts from there; one before it, from the window.
            begun = (starts > 0) & (inputs > 0)
            assert torch.equal((positions - starts + 1)[begun], inputs[begun])
            assert (positions - starts + 1)[inputs > 0].le(inputs[inputs > 0]).all()


def test_a_rank_reads_its_own_slices_only() -> None:
    tokens = Recorded()
    batches = training(tokens=tokens, dp_rank=1, dp_size=3, cp_rank=1, cp_size=4)
    assert tokens.windows == []
    batches.batch(5)
    whole = training().windows(5)
    assert tokens.windows == [slice(w * 8 + 2, w * 8 + 5) for w in whole[4:8].tolist()]


def test_resumed_runs_read_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20)
    options = {"sequence_length": 16, "global_batch_size": 4, "seed": 9}

    def run(dp_size: int, steps: range) -> list[Tensor]:
        # A new process: everything is opened again, under another layout, with other shards.
        dataset = prepare(tmp_path, ByteTokenizer(), tmp_path / "cache", shard_tokens=99 + dp_size)
        ranks = [
            TextBatches(dataset.tokens("train"), dp_rank=rank, dp_size=dp_size, **options)
            for rank in range(dp_size)
        ]
        return [torch.cat([rank.batch(step)[0] for rank in ranks]) for step in steps]

    straight = run(1, range(300))
    resumed = run(1, range(117)) + run(2, range(117, 230)) + run(4, range(230, 300))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_order_of_batches_never_changes() -> None:
    # Resuming a run after an upgrade relies on it.
    assert training().windows(0).tolist() == [2, 101, 70, 112, 96, 32, 75, 45, 94, 43, 123, 99]


@pytest.mark.parametrize("length", [2, 8, 9, 10, 96, 97, 98, 1003])
@pytest.mark.parametrize(("dp_size", "cp_size"), [(1, 1), (2, 1), (3, 4)])
def test_evaluation_predicts_every_token_once(length: int, dp_size: int, cp_size: int) -> None:
    seen: list[int] = []
    counts = set()
    for d, c in itertools.product(range(dp_size), range(cp_size)):
        batches = evaluation(
            tokens=TOKENS[:length], dp_rank=d, dp_size=dp_size, cp_rank=c, cp_size=cp_size
        )
        counts.add((len(batches), len(list(batches))))
        for inputs_bs, targets_bs in batches:
            assert inputs_bs.shape == targets_bs.shape == (12 // dp_size, 8 // cp_size)
            valid = targets_bs != -100
            assert torch.equal(inputs_bs[valid] + 1, targets_bs[valid])
            assert (inputs_bs[~valid] == 0).all()
            seen += targets_bs[valid].tolist()
    assert sorted(seen) == list(range(1, length))
    assert counts == {(-(-(length - 1) // 96), -(-(length - 1) // 96))}


def test_evaluation_is_in_order_and_padded_at_the_end() -> None:
    inputs_bs, targets_bs = map(torch.cat, zip(*evaluation(), strict=True))
    assert torch.equal(inputs_bs[:125].flatten(), torch.arange(1000))
    assert inputs_bs[125].tolist() == [1000, 1001, 0, 0, 0, 0, 0, 0]
    assert targets_bs[125].tolist() == [1001, 1002] + [-100] * 6
    assert inputs_bs.shape == (132, 8)
    assert (targets_bs[126:] == -100).all()


def test_a_fixed_number_of_windows_is_spread_over_the_tokens() -> None:
    batches = evaluation(num_windows=5, global_batch_size=4, ignore_index=-1)
    assert (len(batches), batches.num_windows) == (2, 5)
    inputs_bs, targets_bs = map(torch.cat, zip(*batches, strict=True))
    assert (inputs_bs[:5, 0] // 8).tolist() == [0, 25, 50, 75, 100]
    assert (targets_bs[:5] != -1).all()
    assert (targets_bs[5:] == -1).all()
    assert evaluation(num_windows=10_000).num_windows == 126


def test_errors_say_what_would_be_legal() -> None:
    with pytest.raises(DataError, match=r"8 training tokens .* \+ 1 = 9: .* at most 7"):
        training(tokens=TOKENS[:8])
    assert training(tokens=TOKENS[:9]).num_windows == 1
    with pytest.raises(ConfigError, match=r"global_batch_size 12 .* dp_size 5: .* such as 10"):
        training(dp_size=5)
    with pytest.raises(ConfigError, match=r"sequence_length 8 .* cp_size 3: .* such as 6"):
        training(cp_size=3)
    with pytest.raises(ConfigError, match="global_batch_size 0 cannot"):
        evaluation(global_batch_size=0)
    with pytest.raises(ConfigError, match="dp_rank 2 of dp_size 2"):
        evaluation(dp_rank=2, dp_size=2)
    with pytest.raises(ConfigError, match="cp_rank -1 of cp_size 2"):
        training(cp_rank=-1, cp_size=2)
    with pytest.raises(ConfigError, match="step is -1"):
        training().batch(-1)
    with pytest.raises(ConfigError, match="batch 11 of 11: from 0 to 10"):
        evaluation().batch(11)
    with pytest.raises(ConfigError, match="num_windows is 0"):
        evaluation(num_windows=0)
    with pytest.raises(DataError, match="1 held-out tokens: at least 2"):
        evaluation(tokens=TOKENS[:1])
