"""What the network sees of an alignment: blocks left out, clusters, masked places, extra rows.

The steps are those of AlphaFold's training input, in its order: clusters are counted over the whole
chain, after masking, and crops come later (supplement, sections 1.2.6, 1.2.7 and 1.2.9).

Legend: S sequences, C clusters, E extra sequences, N residues.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fivefold.fold.geometry.residues import GAP, MASKED, NUM_MSA_CLASSES

DELETED_FRACTION, NUM_DELETED_BLOCKS = 0.3, 5
# Of the places to guess: another amino acid, one of the column's profile, unchanged; else masked.
UNIFORM, PROFILE, SAME = 0.1, 0.1, 0.1
_ROWS_AT_ONCE = 1024


def undeleted_rows(num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of the rows that stay when blocks are deleted (algorithm 1); row 0 always does."""
    size = math.floor(num_rows * DELETED_FRACTION)
    starts = rng.integers(0, num_rows, NUM_DELETED_BLOCKS)
    kept = np.ones(num_rows, bool)
    for start in starts:
        kept[start : start + size] = False
    kept[0] = True
    return np.flatnonzero(kept)


def sampled_rows(
    num_rows: int, num_clusters: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the rows that become centres, row 0 first, and of all others, shuffled."""
    order = np.concatenate(([0], 1 + rng.permutation(num_rows - 1)))
    return order[:num_clusters], order[num_clusters:]


def profile(classes: Tensor) -> Tensor:
    """How often each class occurs in each column: (N, 22) of classes (S, N)."""
    return torch.stack([(classes == each).float().mean(0) for each in range(GAP + 1)], -1)


def masked(
    classes: Tensor, profile_nc: Tensor, fraction: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Classes (C, N) of which a fraction was replaced, and the mask (C, N) of those to guess.

    Args:
        classes: (C, N)
        profile_nc: (N, 22) of the whole alignment.
        fraction: to guess.
        rng: of the draws.
    """
    rows, columns = classes.shape
    bert_mask = torch.from_numpy(rng.random((rows, columns)) < fraction)
    kind = torch.from_numpy(rng.random((rows, columns)))
    uniform = torch.from_numpy(rng.integers(0, 20, (rows, columns)))
    point = torch.from_numpy(rng.random((rows, columns))).float()
    cumulated = profile_nc.cumsum(-1)
    # A draw at the very end must not land behind the last class that occurs.
    column = cumulated / cumulated[:, -1:]
    from_profile = torch.searchsorted(column, point.T.contiguous(), right=True).T.clamp(max=GAP)
    replaced = torch.full_like(classes, MASKED)
    replaced = torch.where(kind < UNIFORM + PROFILE + SAME, classes, replaced)
    replaced = torch.where(kind < UNIFORM + PROFILE, from_profile, replaced)
    replaced = torch.where(kind < UNIFORM, uniform, replaced)
    return torch.where(bert_mask, replaced, classes), bert_mask.float()


def nearest_centres(centres: Tensor, extra: Tensor) -> Tensor:
    """For each extra row (E, N) the number of the centre (C, N) that agrees in most columns.

    Agreement in gaps and in masked places does not count; of equals the first wins.
    """
    wanted = _one_hot(centres, GAP)
    found = [
        (_one_hot(extra[start : start + _ROWS_AT_ONCE], GAP) @ wanted.T).argmax(-1)
        for start in range(0, len(extra), _ROWS_AT_ONCE)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _one_hot(classes: Tensor, num_counted: int) -> Tensor:
    return F.one_hot(classes, NUM_MSA_CLASSES)[..., :num_counted].flatten(1).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Means over a centre and the rows nearest to it.

    Attributes:
        profile: (C, N, 23) how often each class occurs.
        deletions: (C, N) mean number of deletions.
    """

    profile: Tensor
    deletions: Tensor


def summarized(
    centres: Tensor, centre_deletions: Tensor, extra: Tensor, extra_deletions: Tensor
) -> Clusters:
    """Profiles of the clusters around centres (C, N), of which extra (E, N) are the other rows."""
    nearest = nearest_centres(centres, extra)
    counts = 1 + 1e-6 + torch.bincount(nearest, minlength=len(centres)).float()
    totals = F.one_hot(centres, NUM_MSA_CLASSES).float()
    for start in range(0, len(extra), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        one_hot = F.one_hot(extra[rows], NUM_MSA_CLASSES).float()
        totals.index_add_(0, nearest[rows], one_hot)
    deletions = centre_deletions.float().index_add(0, nearest, extra_deletions.float())
    return Clusters(profile=totals / counts[:, None, None], deletions=deletions / counts[:, None])


def squashed(deletions: Tensor) -> Tensor:
    """Numbers of deletions, brought between 0 and 1."""
    return torch.atan(deletions.float() / 3) * (2 / math.pi)


def msa_feat(classes: Tensor, deletions: Tensor, clusters: Clusters) -> Tensor:
    """The features (C, N, 49) of clusters (supplement, table 1)."""
    return torch.cat(
        (
            F.one_hot(classes, NUM_MSA_CLASSES).float(),
            deletions.clamp(0, 1).float().unsqueeze(-1),
            squashed(deletions).unsqueeze(-1),
            clusters.profile,
            squashed(clusters.deletions).unsqueeze(-1),
        ),
        -1,
    )
