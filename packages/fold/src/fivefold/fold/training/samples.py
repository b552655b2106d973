"""Which chains a run learns from and is scored on, and the samples of each of its steps.

Everything drawn is a pure function of (seed, number of the sample) or (seed, step): a run that goes
on, any number of ranks and any worker draw the same.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor

from fivefold.fold.data.dataset import Chains, TrainingSamples, sampling_weights
from fivefold.fold.errors import FoldDataError
from fivefold.fold.training.config import DataConfig, RunConfig

MOST_TRIES = 10
"""Chains that are drawn for one sample, where those drawn before cannot be used."""


@dataclass(frozen=True, slots=True)
class Split:
    """Names of the chains of a run.

    Attributes:
        train: to learn from.
        heldout: to score on.
    """

    train: list[str]
    heldout: list[str]


def split_chains(chains: Chains, config: DataConfig) -> Split:
    """Chains to learn from and to score on.

    Raises:
        FoldDataError: there is no chain of a name, or none is left to learn from.
    """
    sequences = {record["name"]: record["sequence"] for record in chains.records}
    lost = [name for name in (*config.chains, *config.heldout) if name not in sequences]
    if lost:
        raise FoldDataError(
            f"{chains.folder} has no chains {', '.join(lost)}; it has {_some(sequences)}"
        )
    held = {sequences[name] for name in config.heldout}
    free = [name for name in sequences if sequences[name] not in held]
    fraction = {name for name in free if _place(sequences[name]) < config.heldout_fraction}
    train = [name for name in config.chains or free if name not in fraction]
    same = [name for name in train if sequences[name] in held]
    if same:
        raise FoldDataError(f"{_some(same)} to train on have the sequence of a held-out chain")
    if not train:
        raise FoldDataError(f"of the {len(sequences)} chains of {chains.folder} all are held out")
    return Split(train, [*config.heldout, *(name for name in free if name in fraction)])


def _place(sequence: str) -> float:
    """Where a sequence lies between 0 and 1, whatever other chains there are."""
    return int.from_bytes(hashlib.blake2b(sequence.encode(), digest_size=6).digest()) / 2**48


def _some(names: Sequence[str] | dict[str, str]) -> str:
    shown = ", ".join(list(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def recycles_of(seed: int, step: int, most: int) -> int:
    """Iterations before the one that counts, uniform from 0 to ``most``; alike on all ranks."""
    return int(np.random.default_rng([seed, step, 1]).integers(0, most + 1))


def seed_of(seed: int, sample: int) -> int:
    """What the random numbers inside the network follow from, for one sample."""
    return int(np.random.default_rng([seed, sample, 3]).integers(2**62))


def training_samples(config: RunConfig, chains: Chains) -> TrainingSamples:
    """The endless list of crops of a run."""
    data = config.data
    lengths = [len(record["sequence"]) for record in chains.records]
    weights = sampling_weights(lengths, chains.cluster_sizes(data.clusters), data.sampling)
    seed = config.training.seed
    return TrainingSamples(chains, config.features, seed=seed, weights=weights)


@dataclass(frozen=True, slots=True)
class Sample:
    """One crop.

    Attributes:
        number: in the run.
        name: of its chain.
        features: of each iteration.
        problems: of chains that were drawn before it and could not be used.
    """

    number: int
    name: str
    features: list[dict[str, Tensor]]
    problems: tuple[str, ...] = ()


class StepSamples:
    """The samples of each step on one rank, made ahead in threads.

    Any object with ``of`` and ``close`` can stand in its place.

    Args:
        samples: the list that they are taken from.
        batch_size: samples of a step over all ranks.
        most_recycles: see ``recycles_of``.
        rank: among the ranks that see other data.
        size: how many these are.
        num_workers: threads; 0 makes samples when they are asked for.
        num_ahead: samples that are made before they are needed.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        *,
        batch_size: int,
        most_recycles: int,
        rank: int = 0,
        size: int = 1,
        num_workers: int = 0,
        num_ahead: int = 4,
    ):
        self._samples, self._most_recycles = samples, most_recycles
        self._batch_size, self._share = batch_size, batch_size // size
        self._first = rank * self._share
        self._pool = ThreadPoolExecutor(num_workers, "samples") if num_workers else None
        self._num_ahead = num_ahead
        self._next_step = -1
        self._ahead: Iterator[Sample] = iter(())

    def of(self, step: int) -> list[Sample]:
        """This rank's samples of a step; steps may be asked for in any order.

        Raises:
            FoldDataError: too many chains in a row cannot be used.
        """
        if step != self._next_step:
            self._ahead = _ahead(self._pool, self._make, self._numbers(step), self._num_ahead)
        self._next_step = step + 1
        return [next(self._ahead) for _ in range(self._share)]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _numbers(self, first_step: int) -> Iterator[tuple[int, int]]:
        """Steps and numbers of this rank's samples."""
        for step in count(first_step):
            start = step * self._batch_size + self._first
            for number in range(start, start + self._share):
                yield step, number

    def _make(self, step: int, number: int) -> Sample:
        """A sample; where its chain cannot be used, of another that is drawn instead."""
        recycles = recycles_of(self._samples.seed, step, self._most_recycles)
        chain = self._samples.chain_of(number)
        problems: list[str] = []
        for attempt in range(MOST_TRIES):
            name = self._samples.chains.records[chain]["name"]
            try:
                features = self._samples.features(number, recycles, chain)
            except FoldDataError as error:
                problems.append(str(error))
                rng = np.random.default_rng([self._samples.seed, number, attempt, 2])
                chain = int(rng.integers(len(self._samples.chains)))
                continue
            return Sample(number, name, features, tuple(problems))
        raise FoldDataError(
            f"sample {number}: {MOST_TRIES} chains in a row cannot be used: {'; '.join(problems)}"
        )


def _ahead(
    pool: ThreadPoolExecutor | None,
    make: Callable[[int, int], Sample],
    numbers: Iterator[tuple[int, int]],
    num_ahead: int,
) -> Iterator[Sample]:
    """Samples in their order, the next ones being made while one is used."""
    if pool is None:
        for step, number in numbers:
            yield make(step, number)
        return
    waiting: deque[Future[Sample]] = deque()
    for step, number in numbers:
        waiting.append(pool.submit(make, step, number))
        if len(waiting) > num_ahead:
            yield waiting.popleft().result()
