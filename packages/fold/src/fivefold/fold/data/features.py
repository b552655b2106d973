"""From a chain, its alignment and templates to the features of ``model.features``.

Everything that is drawn follows from (seed, epoch, sample), and what is drawn anew for each
iteration also from the iteration: a run that resumes, and any worker, draws the same.

Legend: N residues, crop or whole; C clusters, E extra sequences, T templates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data import msa
from fivefold.fold.data.alignments import Alignment, sequence_of
from fivefold.fold.data.structures import Chain, sequence_to_aatype
from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.atoms import pseudo_beta
from fivefold.fold.geometry.ground_truth import supervised_features
from fivefold.fold.geometry.residues import GAP, LETTERS, NUM_RESIDUE_TYPES

CLAMPED_FRACTION = 0.9
"""Of samples whose FAPE is clamped (supplement, section 1.11.5)."""

_TEMPLATES = {
    "template_aatype": (torch.int64, ()),
    "template_all_atom_positions": (torch.float32, (37, 3)),
    "template_all_atom_masks": (torch.float32, (37,)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Templates:
    """Known structures aligned to a query.

    Attributes:
        aatype: (T, N) numbers of amino acids, 21 where nothing is aligned.
        positions: (T, N, 37, 3) in angstrom.
        mask: (T, N, 37) 1 where an atom is aligned and known.
    """

    aatype: Tensor
    positions: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """All that is known of one chain.

    Attributes:
        name: for errors and reports.
        sequence: of the chain.
        alignment: whose query it is.
        chain: its structure, or None where that is to be predicted.
        resolution: of the structure in angstrom; 0 where there is none.
        templates: best first, or None.
    """

    name: str
    sequence: str
    alignment: Alignment
    chain: Chain | None = None
    resolution: float = 0.0
    templates: Templates | None = None

    def __post_init__(self) -> None:
        # Modified and unknown residues are X on one side and a letter on the other at times.
        ours, theirs = self.sequence, sequence_of(self.alignment)
        same = len(ours) == len(theirs) and all(
            a == b or "X" in (a, b) or a not in LETTERS for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            raise FoldDataError(
                f"{self.name}: the alignment is of {theirs!r}, the chain is {ours!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What random choices follow from.

    Attributes:
        seed: of the run.
        epoch: which pass over the data.
        sample: number of the sample.
    """

    seed: int = 0
    epoch: int = 0
    sample: int = 0

    def rng(self, iteration: int = -1) -> np.random.Generator:
        """A stream of an iteration, or of the whole sample."""
        return np.random.default_rng([self.seed, self.epoch, self.sample, iteration + 1])


def training_features(
    example: Example, config: FeatureConfig, draw: Draw, num_recycles: int = 0
) -> list[dict[str, Tensor]]:
    """A random crop of fixed size, with labels; one mapping per iteration, sharing what is common.

    Args:
        example: with a structure.
        config: sizes; what is smaller is padded, with masks of 0.
        draw: of all random choices.
        num_recycles: iterations before the last.

    Raises:
        FoldDataError: there is no structure to learn from.
    """
    if example.chain is None:
        raise FoldDataError(f"{example.name} has no structure to learn from")
    rng = draw.rng()
    length = len(example.sequence)
    size = min(length, config.crop_size)
    start = int(rng.integers(0, length - size + 1))
    crop = slice(start, start + size)
    common = _common(example, crop, config.crop_size)
    common |= _labels(example.chain, example.resolution, crop, config.crop_size)
    common["use_clamped_fape"] = torch.tensor(float(rng.random() < CLAMPED_FRACTION))
    if config.max_templates:
        chosen = _drawn_templates(example.templates, config.max_templates, rng)
        common |= _template_features(chosen, crop, config.crop_size, config.max_templates)
    return [
        common | _msa_features(example, config, draw.rng(i), crop, training=True)
        for i in range(num_recycles + 1)
    ]


def prediction_features(
    example: Example, config: FeatureConfig, draw: Draw | None = None, num_recycles: int = 0
) -> list[dict[str, Tensor]]:
    """The whole chain without padding; with labels where the structure is known.

    As in AlphaFold's inference the MSA is sampled and masked anew for each iteration.
    """
    crop, size = slice(None), len(example.sequence)
    common = _common(example, crop, size)
    if example.chain is not None:
        common |= _labels(example.chain, example.resolution, crop, size) | {
            "use_clamped_fape": torch.tensor(1.0)
        }
    if config.max_templates:
        first = list(range(config.max_templates))
        chosen = _chosen(example.templates, first)
        common |= _template_features(chosen, crop, size, config.max_templates)
    draw = draw or Draw()
    return [
        common | _msa_features(example, config, draw.rng(i), crop, training=False)
        for i in range(num_recycles + 1)
    ]


def _padded(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind the first dims of x, up to sizes."""
    padding = [0, 0] * (x.dim() - len(sizes))
    for have, want in reversed(list(zip(x.shape, sizes, strict=False))):
        padding += [0, want - have]
    return F.pad(x, padding)


def _common(example: Example, crop: slice, size: int) -> dict[str, Tensor]:
    aatype = torch.from_numpy(sequence_to_aatype(example.sequence))
    index = torch.arange(len(aatype))[crop]
    aatype = aatype[crop]
    target = torch.cat(
        (torch.zeros(len(aatype), 1), F.one_hot(aatype, NUM_RESIDUE_TYPES).float()), -1
    )
    made = {
        "aatype": aatype,
        "residue_index": index,
        "seq_mask": torch.ones(len(aatype)),
        "target_feat": target,
    }
    return {name: _padded(x, (size,)) for name, x in made.items()}


def _labels(chain: Chain, resolution: float, crop: slice, size: int) -> dict[str, Tensor]:
    aatype = _padded(torch.from_numpy(chain.aatype)[crop], (size,))
    positions = _padded(torch.from_numpy(chain.positions)[crop], (size,))
    mask = _padded(torch.from_numpy(chain.mask)[crop], (size,))
    return {
        "all_atom_positions": positions,
        "all_atom_mask": mask,
        "resolution": torch.tensor(float(resolution)),
        **supervised_features(aatype, positions, mask),
    }


def _msa_features(
    example: Example,
    config: FeatureConfig,
    rng: np.random.Generator,
    crop: slice,
    *,
    training: bool,
) -> dict[str, Tensor]:
    classes = torch.from_numpy(example.alignment.classes.astype(np.int64))
    deletions = torch.from_numpy(example.alignment.deletions)
    frequencies = msa.profile(classes)
    if training:
        kept = torch.from_numpy(msa.undeleted_rows(len(classes), rng))
        classes, deletions = classes[kept], deletions[kept]
    num_clusters = max(1, config.max_msa_clusters - config.max_templates)
    chosen, rest = map(torch.from_numpy, msa.sampled_rows(len(classes), num_clusters, rng))
    true, extra = classes[chosen], classes[rest]
    guessed, bert_mask = msa.masked(true, frequencies, config.masked_fraction, rng)
    clusters = msa.summarized(guessed, deletions[chosen], extra, deletions[rest])
    feat = msa.msa_feat(guessed, deletions[chosen], clusters)
    # A view into a shuffled list is a random choice already.
    extra, extra_deletions = extra[: config.max_extra_msa], deletions[rest][: config.max_extra_msa]
    made = {
        "msa_feat": feat[:, crop],
        "msa_mask": torch.ones_like(bert_mask)[:, crop],
        "true_msa": true[:, crop],
        "bert_mask": bert_mask[:, crop],
    }
    of_extra = {
        "extra_msa": extra[:, crop],
        "extra_has_deletion": extra_deletions.clamp(0, 1).float()[:, crop],
        "extra_deletion_value": msa.squashed(extra_deletions)[:, crop],
        "extra_msa_mask": torch.ones(extra.shape)[:, crop],
    }
    size = config.crop_size if training else feat[:, crop].shape[1]
    rows = num_clusters if training else len(true)
    extra_rows = config.max_extra_msa if training else max(len(extra), 1)
    return {
        **{name: _padded(x, (rows, size)) for name, x in made.items()},
        **{name: _padded(x, (extra_rows, size)) for name, x in of_extra.items()},
    }


def _drawn_templates(
    templates: Templates | None, most: int, rng: np.random.Generator
) -> Templates | None:
    """At most ``most`` of them; from none to all are equally likely, as in AlphaFold."""
    count = 0 if templates is None else len(templates.aatype)
    start = int(rng.integers(0, count + 1))
    order = rng.permutation(count)
    return _chosen(templates, order[start : start + most].tolist())


def _chosen(templates: Templates | None, rows: Sequence[int]) -> Templates | None:
    if templates is None:
        return None
    rows = [row for row in rows if row < len(templates.aatype)]
    return Templates(
        aatype=templates.aatype[rows],
        positions=templates.positions[rows],
        mask=templates.mask[rows],
    )


def _template_features(
    templates: Templates | None, crop: slice, size: int, rows: int
) -> dict[str, Tensor]:
    count = 0 if templates is None else len(templates.aatype)
    if templates is None:
        made = {name: torch.zeros(0, size, *s, dtype=t) for name, (t, s) in _TEMPLATES.items()}
    else:
        arrays = (templates.aatype, templates.positions, templates.mask)
        made = {n: x[:, crop] for n, x in zip(_TEMPLATES, arrays, strict=True)}
    made = {name: _padded(x, (rows, size)) for name, x in made.items()}
    there = torch.arange(rows) < count
    aatype, mask = made["template_aatype"], made["template_all_atom_masks"]
    # Rows of padding are gaps throughout; their mask keeps them out of everything.
    aatype[~there] = GAP
    return {
        **made,
        "template_mask": there.float(),
        "template_pseudo_beta": pseudo_beta(aatype, made["template_all_atom_positions"]),
        "template_pseudo_beta_mask": pseudo_beta(aatype, mask.unsqueeze(-1)).squeeze(-1),
    }


def collate(samples: Sequence[Sequence[Mapping[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Samples of equal sizes as one batch; one mapping per iteration.

    Raises:
        FoldDataError: the samples have different numbers of iterations.
    """
    counts = {len(sample) for sample in samples}
    if len(counts) != 1:
        raise FoldDataError(f"samples of one batch have {sorted(counts)} iterations; give one")
    return [
        {name: torch.stack([each[name] for each in iteration]) for name in iteration[0]}
        for iteration in zip(*samples, strict=True)
    ]
