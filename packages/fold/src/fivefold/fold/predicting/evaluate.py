"""Scores of predicted structures against known ones, file by file.

Legend: N residues.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fivefold.fold.data.structures import SUFFIXES, Chain, read_structure
from fivefold.fold.errors import FoldDataError
from fivefold.fold.metrics import Scores, score


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of many predictions.

    Attributes:
        scores: by name of the prediction, then of the score.
        problems: names and reasons of what could not be scored.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Of each score over the predictions that have one."""
        names = list(next(iter(self.scores.values()), {}))
        columns = {n: np.array([each[n] for each in self.scores.values()]) for n in names}
        return {n: float(np.nanmean(x)) for n, x in columns.items() if not np.isnan(x).all()}

    def to_dict(self) -> dict[str, Any]:
        """All of it and the means."""
        return {**asdict(self), "means": self.means()}


def evaluate(predictions: str | Path, structures: str | Path) -> Evaluation:
    """Score predictions by known structures.

    Args:
        predictions: a file, or a folder of files such as 1abc_A.pdb; of files that differ only in
            their suffix one counts.
        structures: the file, or a folder with 1abc.cif or 1abc_A.cif for each of them.

    Raises:
        FoldDataError: there is no prediction.
    """
    found = Evaluation()
    files = list(_files(Path(predictions)))
    if not files:
        raise FoldDataError(f"{predictions} has no prediction; looked for {', '.join(SUFFIXES)}")
    for path in files:
        name = path.name.split(".")[0]
        try:
            found.scores[name] = _score_file(path, name, Path(structures))
        except FoldDataError as error:
            found.problems.append({"name": name, "reason": str(error)})
    return found


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    seen = set()
    for path in sorted(place.glob("*")):
        plain = Path(path.stem) if path.suffix == ".gz" else path
        if plain.suffix.lower() in SUFFIXES and plain.stem not in seen:
            seen.add(plain.stem)
            yield path


def _score_file(path: Path, name: str, structures: Path) -> dict[str, float]:
    chains = read_structure(path).chains
    if len(chains) != 1:
        raise FoldDataError(f"{path} has chains {', '.join(chains)}; a prediction is of one")
    (predicted,) = chains.values()
    found = score_chain(predicted, _truth(name, structures))
    return {key: float(value) for key, value in asdict(found).items()}


def _truth(name: str, structures: Path) -> Chain:
    """The chain ``1abc_A`` of its entry; the only one of a file of that whole name."""
    entry, _, chain = name.rpartition("_")
    if structures.is_file():
        truth = read_structure(structures)
        return truth.chain(_only(truth.chains, chain))
    for stem in (name, entry):
        for suffix in SUFFIXES:
            for path in (structures / f"{stem}{suffix}{packed}" for packed in ("", ".gz")):
                if stem and path.is_file():
                    truth = read_structure(path)
                    return truth.chain(_only(truth.chains, chain))
    raise FoldDataError(f"{structures} has neither {name} nor {entry or name} of any suffix")


def _only(chains: Any, name: str) -> str:
    return name if name in chains or len(chains) != 1 else next(iter(chains))


def score_chain(predicted: Chain, true: Chain) -> Scores:
    """All scores of a chain; the prediction is of the whole sequence or of what was seen of it.

    Raises:
        FoldDataError: it is of another sequence, or nothing of the chain was seen.
    """
    seen = np.flatnonzero(true.mask.any(-1))
    letters = "".join(true.sequence[i] for i in seen)
    if _alike(predicted.sequence, true.sequence):
        places = np.arange(len(true.sequence))
    elif _alike(predicted.sequence, letters):
        places = seen
    else:
        raise FoldDataError(
            f"the prediction is of {predicted.sequence!r}, the structure is {true.sequence!r}"
        )
    # An atom that was not predicted is no less wrong for that: it stays at the origin.
    mask = torch.from_numpy(true.mask[places])
    if mask[:, 1].sum() == 0:
        raise FoldDataError("of the structure no alpha carbon is known")
    return score(
        torch.from_numpy(predicted.positions), torch.from_numpy(true.positions[places]), mask
    )


def _alike(one: str, other: str) -> bool:
    return len(one) == len(other) and all(
        a == b or "X" in (a, b) for a, b in zip(one, other, strict=True)
    )
