"""Prepared chains as a map-style dataset, and how often each is drawn."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data.alignments import Alignment
from fivefold.fold.data.features import Draw, Example, Templates, training_features
from fivefold.fold.data.prepare import FORMAT, INDEX
from fivefold.fold.data.structures import Chain
from fivefold.fold.errors import FoldDataError

Rule = Literal["alphafold", "mlperf", "uniform"]


def sampling_weights(
    lengths: Sequence[int], cluster_sizes: Sequence[int], rule: Rule
) -> NDArray[np.float64]:
    """How likely each chain is drawn; they sum to 1.

    Args:
        lengths: of the chains.
        cluster_sizes: how many chains are alike, for each chain.
        rule: ``alphafold``: by length between 256 and 512, divided by the cluster's size
            (supplement, section 1.2.5); ``mlperf``: by the root of that size; or ``uniform``.

    Raises:
        FoldDataError: there is no such rule.
    """
    by_length = np.clip(np.asarray(lengths, np.float64), 256, 512) / 512
    sizes = np.asarray(cluster_sizes, np.float64)
    rules = {
        "alphafold": by_length / sizes,
        "mlperf": by_length / np.sqrt(sizes),
        "uniform": np.ones(len(sizes)),
    }
    if rule not in rules:
        raise FoldDataError(f"there is no rule {rule!r} of sampling; there are {', '.join(rules)}")
    return rules[rule] / rules[rule].sum()


class Chains:
    """The chains of a folder that ``prepare`` wrote, as examples.

    Args:
        folder: with ``index.json`` and its shards.
        names: of the chains to keep, in that order; None for all.

    Raises:
        FoldDataError: not such a folder, of another format, or without one of the names.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] | None = None):
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise FoldDataError(f"{folder} was not prepared: {error}") from error
        if index.get("format") != FORMAT:
            raise FoldDataError(
                f"{folder} has format {index.get('format')}, {FORMAT} is read; prepare it again"
            )
        records: dict[str, Mapping[str, Any]] = {each["name"]: each for each in index["chains"]}
        lost = [name for name in names or () if name not in records]
        if lost:
            raise FoldDataError(f"{folder} has no chains {', '.join(lost)}; see its {INDEX}")
        self.records = [records[name] for name in (records if names is None else names)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Example:
        record = self.records[number]
        try:
            return self._example(record)
        except (OSError, SafetensorError) as error:
            raise FoldDataError(
                f"{record['name']} cannot be read from {self.folder / record['shard']}: {error}"
            ) from error

    def _example(self, record: Mapping[str, Any]) -> Example:
        path = self.folder / record["shard"]
        # A shard that was written anew is another file under the same name.
        name, shard = record["name"], _opened(path, path.stat().st_mtime_ns)
        classes = shard.get_tensor(f"{name}/classes")
        return Example(
            name=name,
            sequence=record["sequence"],
            alignment=Alignment(
                classes=classes,
                deletions=shard.get_tensor(f"{name}/deletions"),
                names=("",) * len(classes),  # not kept: nothing is learned from them
            ),
            chain=Chain(
                name=name,
                sequence=record["sequence"],
                positions=shard.get_tensor(f"{name}/positions"),
                mask=shard.get_tensor(f"{name}/mask").astype(np.float32),
            ),
            resolution=record["resolution"],
            templates=_templates(shard, name),
        )

    def cluster_sizes(self, clusters: str | Path | None = None) -> list[int]:
        """For each chain how many are like it.

        Args:
            clusters: a file with a cluster a line, names separated by blanks, as the PDB publishes
                them; chains that it lacks are alone. None takes equal sequences as clusters.
        """
        if clusters is None:
            counts = Counter(record["sequence"] for record in self.records)
            return [counts[record["sequence"]] for record in self.records]
        sizes: dict[str, int] = {}
        for line in Path(clusters).read_text().splitlines():
            sizes |= dict.fromkeys(line.upper().split(), len(line.split()))
        return [sizes.get(record["name"].upper(), 1) for record in self.records]


def _templates(shard: Any, name: str) -> Templates | None:
    if f"{name}/template_aatype" not in shard.keys():  # noqa: SIM118  # a file, not a mapping
        return None
    arrays = (f"{name}/template_{of}" for of in ("aatype", "positions", "mask"))
    aatype, positions, mask = (torch.from_numpy(shard.get_tensor(each)) for each in arrays)
    return Templates(aatype=aatype, positions=positions, mask=mask)


@lru_cache(8)
def _opened(path: Path, time: int) -> Any:
    return safe_open(path, "np")


class TrainingSamples:
    """Crops in the order of a run: sample ``n`` is a pure function of n and the arguments.

    An epoch draws as many chains as there are, by weight and with replacement.

    Args:
        chains: to draw from.
        config: sizes of crops.
        seed: of the order and of all crops.
        weights: of the chains; None for equal ones.
        num_recycles: for each sample, how many iterations precede the last; all samples of a batch
            need the same.
    """

    def __init__(
        self,
        chains: Chains,
        config: FeatureConfig,
        *,
        seed: int = 0,
        weights: NDArray[np.float64] | None = None,
        num_recycles: int = 0,
    ):
        if not len(chains):
            raise FoldDataError(f"{chains.folder} has no chain to draw")
        self.chains, self.config, self.seed = chains, config, seed
        self.weights, self.num_recycles = weights, num_recycles
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def chain_of(self, sample: int) -> int:
        """Number of the chain that sample ``n`` is a crop of."""
        epoch, place = divmod(sample, len(self.chains))
        known = self._epoch  # read once: other threads may be in another epoch
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            drawn = rng.choice(len(self.chains), len(self.chains), p=self.weights)
            known = self._epoch = (epoch, drawn)
        return int(known[1][place])

    def __getitem__(self, sample: int) -> list[dict[str, Tensor]]:
        return self.features(sample, self.num_recycles)

    def features(
        self, sample: int, num_recycles: int, chain: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Sample ``n`` with so many recycles; of a chain by number instead of the one drawn."""
        example = self.chains[self.chain_of(sample) if chain is None else chain]
        draw = Draw(seed=self.seed, epoch=sample // len(self.chains), sample=sample)
        return training_features(example, self.config, draw, num_recycles)
