"""Batches: which tokens a rank reads at which step, as a pure function of the step.

Nothing here counts or remembers. Sample ``n`` of a run, the windows it stands for and the rank it
falls to follow from the constructor's arguments, so a run resumed at any step, under any layout,
reads exactly what the uninterrupted one would have read.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fivefold.parallel_core.documents import starts_after
from fivefold.parallel_core.errors import ConfigError, DataError
from fivefold.parallel_core.sequence_split import Split, held
from fivefold.parallel_core.training.permutation import permute

# b: this rank's rows of the global batch, s: its slice of the sequence


class Tokens(Protocol):
    """A sequence of token ids that slices into arrays: ``MappedTokens``, or any numpy vector."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def __getitem__(self, window: slice, /) -> NDArray[Any]:
        """The tokens ``[start:stop]``, (N,)."""
        ...


class _Windows:
    """Cuts windows of ``sequence_length`` tokens (and the next one) into this rank's share.

    Window w predicts tokens w*S+1 .. w*S+S from w*S .. w*S+S-1, S = ``sequence_length``: windows
    overlap by one token, and every token but the first is a target exactly once.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        sequence_length: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cp_rank: int,
        cp_size: int,
        split: Split,
        end_of_text_id: int | None,
    ):
        _check_share("global_batch_size", global_batch_size, "dp", dp_rank, dp_size)
        _check_share("sequence_length", sequence_length, "cp", cp_rank, cp_size)
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self._num_rows = global_batch_size // dp_size
        self._first_row = dp_rank * self._num_rows
        self._held = held(sequence_length, cp_size, cp_rank, split)
        self._end_of_text_id = end_of_text_id

    def _rows(self, step: int) -> NDArray[np.int64]:
        """Numbers of this rank's rows at ``step``, counted over the whole run."""
        start = step * self.global_batch_size + self._first_row
        return np.arange(start, start + self._num_rows)

    def _batch(self, windows: NDArray[np.int64], padding: int) -> tuple[Tensor, ...]:
        """This rank's part of ``windows``, and of where their documents start if that is asked."""
        pair, end = self._read(windows, padding), self._end_of_text_id
        return pair if end is None else (*pair, self._starts(windows, end))

    def _starts(self, windows: NDArray[np.int64], end_of_text_id: int) -> Tensor:
        """For each token here where its document starts in its window.

        A document that began before its window starts with it, and so does not reach back.
        """
        whole_bs = torch.zeros(len(windows), self.sequence_length, dtype=torch.int64)
        for row, window in enumerate(windows.tolist()):
            start = window * self.sequence_length
            ids = self.tokens[start : start + self.sequence_length].astype(np.int64)
            whole_bs[row, : len(ids)] = torch.from_numpy(ids)
        starts_bs = starts_after(whole_bs, end_of_text_id)
        return torch.cat([starts_bs[:, at.start : at.stop] for at in self._held], 1)

    def _read(self, windows: NDArray[np.int64], padding: int) -> tuple[Tensor, Tensor]:
        """This rank's part of ``windows``; 0 and ``padding`` as targets beyond the tokens."""
        inputs_bs = torch.zeros(len(windows), sum(map(len, self._held)), dtype=torch.int64)
        targets_bs = torch.full_like(inputs_bs, padding)
        for row, window in enumerate(windows.tolist()):
            column = 0
            for at in self._held:
                start = window * self.sequence_length + at.start
                ids = self.tokens[start : start + len(at) + 1].astype(np.int64)
                if len(ids) > 1:
                    here = slice(column, column + len(ids) - 1)
                    inputs_bs[row, here] = torch.from_numpy(ids[:-1])
                    targets_bs[row, here] = torch.from_numpy(ids[1:])
                column += len(at)
        return inputs_bs, targets_bs


class TextBatches(_Windows):
    """Training batches: each epoch visits every full window once, in an order of its own.

    Row r of global batch t is sample n = t * global_batch_size + r of an endless run of epochs:
    sample n % num_windows of epoch n // num_windows, whose order follows from (seed, epoch). Rank
    d of the data axis holds rows [d*B/dp, (d+1)*B/dp), so the global batch is the same for every
    ``dp_size``.

    Args:
        tokens: the training split.
        sequence_length: tokens per sample.
        global_batch_size: samples per step over all ranks, a multiple of ``dp_size``.
        seed: of the order.
        dp_rank, dp_size: this rank's place among those that read different rows.
        cp_rank, cp_size: its place among those that read different parts of the same rows.
        split: how these split a row; see ``sequence_split``.
        end_of_text_id: the last token of every document; batches then say where documents start,
            so that they do not see each other. None tells nothing of documents.

    Raises:
        DataError: fewer tokens than one window.
        ConfigError: sizes that do not divide or a rank beyond its axis.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        split: Split = "contiguous",
        end_of_text_id: int | None = None,
    ):
        super().__init__(
            tokens,
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_rank=cp_rank,
            cp_size=cp_size,
            split=split,
            end_of_text_id=end_of_text_id,
        )
        self.seed = seed
        self.num_windows = (len(tokens) - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"{len(tokens)} training tokens do not fill one window of sequence_length + 1 = "
                f"{sequence_length + 1}: add text, or set sequence_length to at most "
                f"{max(len(tokens) - 1, 0)}"
            )

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's part of global batch ``step`` (from 0).

        Returns:
            inputs and targets, int64 (global_batch_size / dp_size, sequence_length / cp_size), and
            with ``end_of_text_id`` starts of documents of the same shape (see ``documents``).
        """
        if step < 0:
            raise ConfigError(f"step is {step}: at least 0")
        # Training windows are always full: the padding value never shows.
        return self._batch(self.windows(step), padding=-1)

    def windows(self, step: int) -> NDArray[np.int64]:
        """Which windows this rank's rows of global batch ``step`` are, (rows,)."""
        samples = self._rows(step)
        epochs, positions = samples // self.num_windows, samples % self.num_windows
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            positions[here] = permute(positions[here], self.num_windows, self.seed, epoch)
        return positions

    def epoch(self, step: int) -> float:
        """How often the data has been seen before ``step``, with fractions."""
        return step * self.global_batch_size / self.num_windows


class EvaluationBatches(_Windows):
    """The held-out tokens in order, the same batches every time.

    Args:
        tokens: the held-out split.
        sequence_length: tokens per window; the last window may be shorter and is padded.
        global_batch_size: windows per batch over all ranks, a multiple of ``dp_size``.
        num_windows: use this many, spread evenly over the tokens; None, or more than there are,
            uses all, and every token but the first is a target exactly once.
        ignore_index: target at padding, in a last short window and in rows that only fill up the
            last batch. All ranks have equally many batches of equal shape.
        dp_rank, dp_size, cp_rank, cp_size, split, end_of_text_id: as in ``TextBatches``.

    Raises:
        DataError: fewer than two tokens.
        ConfigError: sizes that do not divide, a rank beyond its axis, or no windows.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        sequence_length: int,
        global_batch_size: int,
        num_windows: int | None = None,
        ignore_index: int = -100,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        split: Split = "contiguous",
        end_of_text_id: int | None = None,
    ):
        super().__init__(
            tokens,
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_rank=cp_rank,
            cp_size=cp_size,
            split=split,
            end_of_text_id=end_of_text_id,
        )
        if num_windows is not None and num_windows < 1:
            raise ConfigError(f"num_windows is {num_windows}: at least 1, or None for all")
        if len(tokens) < 2:
            raise DataError(f"{len(tokens)} held-out tokens: at least 2 are needed to measure on")
        self.ignore_index = ignore_index
        self._num_available = -(-(len(tokens) - 1) // sequence_length)
        self.num_windows = min(num_windows or self._num_available, self._num_available)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_windows // self.global_batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """All batches in order."""
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> tuple[Tensor, ...]:
        """This rank's part of batch ``number``, as ``TextBatches.batch`` gives one."""
        if not 0 <= number < len(self):
            raise ConfigError(f"batch {number} of {len(self)}: from 0 to {len(self) - 1}")
        rows = self._rows(number)
        # Rows that only fill up the batch get the first window number that holds no target.
        spread = rows * self._num_available // self.num_windows
        windows = np.where(rows < self.num_windows, spread, self._num_available)
        return self._batch(windows, self.ignore_index)


def _check_share(name: str, total: int, axis: str, rank: int, size: int) -> None:
    if size < 1 or not 0 <= rank < size:
        raise ConfigError(f"{axis}_rank {rank} of {axis}_size {size}: from 0 to {axis}_size - 1")
    if total < 1 or total % size:
        raise ConfigError(
            f"{name} {total} cannot be shared by {axis}_size {size}: "
            f"a positive multiple of {size} can, such as {max(total // size, 1) * size}"
        )
