"""How near a predicted structure is to the known one.

Everything is batched and takes masks; distances are in angstrom. What cannot be scored, because
nothing or one atom alone is known, is NaN: a mean over chains should leave it out, not count it.

Legend: any leading dims, N points (alpha carbons), R residues, P atoms of a residue, K trials.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.fold.errors import FoldInputError

LDDT_TOLERANCES = (0.5, 1.0, 2.0, 4.0)
LDDT_CUTOFF = 15.0
GDT_TS_CUTOFFS = (1.0, 2.0, 4.0, 8.0)
GDT_HA_CUTOFFS = (0.5, 1.0, 2.0, 4.0)
CA = 1
"""Of the alpha carbon among the 37 atoms."""

_ROWS_AT_ONCE = 512
_NUM_REFINEMENTS = 20
_SHORTEST_FRAGMENT = 4


def lddt_ca(predicted: Tensor, true: Tensor, mask: Tensor, *, per_residue: bool = False) -> Tensor:
    """The lDDT of alpha carbons (Mariani et al. 2013) of chains whose atoms are listed as 37.

    Args:
        predicted: positions (..., R, 37, 3).
        true: positions (..., R, 37, 3).
        mask: (..., R, 37) 1 where the truth is known.
        per_residue: a score of each residue (..., R), not one of the chain (...).
    """
    _check(predicted, true, mask)
    return lddt(predicted[..., CA, :], true[..., CA, :], mask[..., CA], per_point=per_residue)


def lddt_all_atom(
    predicted: Tensor, true: Tensor, mask: Tensor, *, per_residue: bool = False
) -> Tensor:
    """The lDDT of all atoms; distances within a residue do not count.

    Args:
        predicted: positions (..., R, P, 3).
        true: positions (..., R, P, 3).
        mask: (..., R, P) 1 where the truth is known.
        per_residue: a score of each residue (..., R), not one of the chain (...).
    """
    _check(predicted, true, mask)
    num_residues, num_atoms = mask.shape[-2:]
    group = torch.arange(num_residues, device=mask.device).repeat_interleave(num_atoms)
    right, scored = _lddt_counts(
        predicted.flatten(-3, -2), true.flatten(-3, -2), mask.flatten(-2), group, None, LDDT_CUTOFF
    )
    right, scored = (x.unflatten(-1, (num_residues, num_atoms)).sum(-1) for x in (right, scored))
    return right / scored if per_residue else right.sum(-1) / scored.sum(-1)


def lddt(
    predicted: Tensor,
    true: Tensor,
    mask: Tensor,
    *,
    per_point: bool = False,
    chain: Tensor | None = None,
    cutoff: float = LDDT_CUTOFF,
) -> Tensor:
    """Share of distances to near points that are right, at four tolerances.

    Args:
        predicted: positions (..., N, 3).
        true: positions (..., N, 3).
        mask: (..., N) 1 where the truth is known.
        per_point: a score of each point (..., N), not one of all (...).
        chain: (..., N) numbers; with it only distances between different chains count.
        cutoff: of what is near in the truth.
    """
    _check(predicted, true, mask)
    group = torch.arange(mask.shape[-1], device=mask.device)
    right, scored = _lddt_counts(predicted, true, mask, group, chain, cutoff)
    return right / scored if per_point else right.sum(-1) / scored.sum(-1)


def _lddt_counts(
    predicted: Tensor,
    true: Tensor,
    mask: Tensor,
    group: Tensor,
    chain: Tensor | None,
    cutoff: float,
) -> tuple[Tensor, Tensor]:
    """Of each point how many distances are right, as a mean over tolerances, and how many count.

    Rows go a few at a time, for all atoms squared do not fit into memory.
    """
    # Counts of float32 are exact only up to 2^24, and there are more pairs of atoms than that.
    counted = torch.float64
    found = []
    for start in range(0, mask.shape[-1], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        true_apart = _apart(true[..., rows, :], true)
        scored = (true_apart < cutoff) & (group[rows].unsqueeze(-1) != group)
        scored &= (mask[..., rows].unsqueeze(-1) * mask.unsqueeze(-2)) > 0
        if chain is not None:
            scored &= chain[..., rows].unsqueeze(-1) != chain.unsqueeze(-2)
        off = (true_apart - _apart(predicted[..., rows, :], predicted)).abs()
        right = sum((scored & (off < limit)).sum(-1, dtype=counted) for limit in LDDT_TOLERANCES)
        found.append((right / len(LDDT_TOLERANCES), scored.sum(-1, dtype=counted)))
    rights, counts = zip(*found, strict=True)
    return torch.cat(rights, -1), torch.cat(counts, -1)


def drmsd(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Root mean square (...) of the errors of all distances; mirror images have 0.

    Differentiable. Over ordered pairs of different points, as in MLPerf's reference.
    """
    _check(predicted, true, mask)
    pairs = mask.unsqueeze(-1) * mask.unsqueeze(-2)
    pairs = pairs * (1 - torch.eye(mask.shape[-1], dtype=mask.dtype, device=mask.device))
    # The distance of a point to itself has no gradient: it is left out before the root.
    squared = (_safe_apart(predicted, pairs) - _safe_apart(true, pairs)).square() * pairs
    return (squared.sum((-2, -1)) / pairs.sum((-2, -1))).sqrt()


def _safe_apart(x: Tensor, pairs: Tensor) -> Tensor:
    squared = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    return torch.where(pairs > 0, squared, torch.ones_like(squared)).sqrt()


def superpose(mobile: Tensor, fixed: Tensor, weight: Tensor) -> Tensor:
    """``mobile`` (..., N, 3) turned and moved onto ``fixed``, without mirroring (Kabsch 1976).

    Points whose weight (..., N) is 0 are moved along but do not count. Differentiable.
    """
    _check(mobile, fixed, weight)
    total = weight.sum(-1, keepdim=True).clamp(min=1e-12).unsqueeze(-1)
    w = weight.unsqueeze(-1)
    from_center, to_center = ((x * w).sum(-2, keepdim=True) / total for x in (mobile, fixed))
    covariance = ((mobile - from_center) * w).transpose(-1, -2) @ (fixed - to_center)
    u, _, vh = torch.linalg.svd(covariance)
    handedness = torch.linalg.det(u @ vh).sign()
    keep = torch.ones_like(covariance[..., 0])
    keep = torch.cat((keep[..., :2], handedness.unsqueeze(-1)), -1)
    rotation = (u * keep.unsqueeze(-2)) @ vh
    return (mobile - from_center) @ rotation + to_center


def rmsd(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Root mean square distance (...) after superposition of all known points."""
    return _root_mean_square(superpose(predicted, true, mask) - true, mask)


def _root_mean_square(error: Tensor, mask: Tensor) -> Tensor:
    return ((error.square().sum(-1) * mask).sum(-1) / mask.sum(-1)).sqrt()


def gdt(
    predicted: Tensor,
    true: Tensor,
    mask: Tensor,
    cutoffs: tuple[float, ...] = GDT_TS_CUTOFFS,
    *,
    search: bool = False,
) -> Tensor:
    """Share (...) of points that superposition brings within a cutoff, a mean over cutoffs.

    Args:
        predicted: positions (..., N, 3).
        true: positions (..., N, 3).
        mask: (..., N) 1 where the truth is known.
        cutoffs: ``GDT_TS_CUTOFFS`` or ``GDT_HA_CUTOFFS``.
        search: for each cutoff the best of many superpositions, as the score is defined (Zemla
            2003), found as TM-score finds its own; else that of all points, as in MLPerf.
    """
    _check(predicted, true, mask)
    off = _trials(predicted, true, mask, search)
    known = mask.unsqueeze(-2)
    shares = [((off < c) * known).sum(-1).amax(-1) / mask.sum(-1) for c in cutoffs]
    return torch.stack(shares).mean(0)


def tm_score(predicted: Tensor, true: Tensor, mask: Tensor, *, search: bool = True) -> Tensor:
    """TM-score (...) of Zhang and Skolnick (2004), of chains whose residues correspond.

    Args:
        predicted: positions (..., N, 3).
        true: positions (..., N, 3).
        mask: (..., N) 1 where the truth is known; their number is the length of the chain.
        search: the best of many superpositions, as the score is defined; else that of all points.
    """
    _check(predicted, true, mask)
    off = _trials(predicted, true, mask, search)
    scale = tm_scale(mask.sum(-1))[..., None, None]
    scores = (mask.unsqueeze(-2) / (1 + (off / scale).square())).sum(-1)
    return scores.amax(-1) / mask.sum(-1)


def tm_scale(length: Tensor) -> Tensor:
    """The distance at which a residue counts half, by the length of the chain; at least 0.5."""
    return torch.where(
        length > 15, 1.24 * (length - 15).clamp(min=0).pow(1 / 3) - 1.8, torch.zeros_like(length)
    ).clamp(min=0.5)


def _trials(predicted: Tensor, true: Tensor, mask: Tensor, search: bool) -> Tensor:
    """How far off points are (..., K, N) after each of K superpositions."""
    if not search:
        return (superpose(predicted, true, mask) - true).norm(dim=-1).unsqueeze(-2)
    weight = _fragments(mask)
    mobile, fixed = (x.unsqueeze(-3).expand(*weight.shape, 3) for x in (predicted, true))
    scale = tm_scale(mask.sum(-1))[..., None, None].clamp(4.5, 8)
    known = mask.unsqueeze(-2).expand_as(weight)
    tried = []
    for _ in range(_NUM_REFINEMENTS):
        off = (superpose(mobile, fixed, weight) - fixed).norm(dim=-1)
        tried.append(off)
        near = known * (off < _radius(off, known, scale)).to(off.dtype)
        if torch.equal(near, weight):
            break
        weight = near
    return torch.cat(tried, -2)


def _radius(off: Tensor, known: Tensor, scale: Tensor) -> Tensor:
    """``scale``, or as much more as it takes to hold three points, which fix a superposition."""
    far = torch.where(known > 0, off, torch.full_like(off, math.inf))
    third = far.sort(-1).values[..., min(2, off.shape[-1] - 1)].unsqueeze(-1)
    return torch.maximum(scale, third + 1e-6)


def _fragments(mask: Tensor) -> Tensor:
    """Masks (..., K, N) of all known points, and of runs of half, a quarter ... of the chain."""
    num = mask.shape[-1]
    rows = [torch.ones(num)]
    length = num // 2
    while length >= _SHORTEST_FRAGMENT:
        for start in range(0, num - length + 1, max(length // 2, 1)):
            rows.append(torch.zeros(num).index_fill(0, torch.arange(start, start + length), 1))
        length //= 2
    fragments = torch.stack(rows).to(mask)
    return mask.unsqueeze(-2) * fragments


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Every score of one chain, or of a batch of them; see the functions of these names."""

    lddt_ca: Tensor
    drmsd_ca: Tensor
    rmsd_ca: Tensor
    gdt_ts: Tensor
    gdt_ha: Tensor
    tm_score: Tensor


@torch.no_grad()
def score(predicted: Tensor, true: Tensor, mask: Tensor) -> Scores:
    """All scores of alpha carbons, of atoms (..., R, 37, 3) and their mask (..., R, 37)."""
    _check(predicted, true, mask)
    ca = (predicted[..., CA, :].double(), true[..., CA, :].double(), mask[..., CA].double())
    return Scores(
        lddt_ca=lddt(*ca),
        drmsd_ca=drmsd(*ca),
        rmsd_ca=rmsd(*ca),
        gdt_ts=gdt(*ca),
        gdt_ha=gdt(*ca, GDT_HA_CUTOFFS),
        tm_score=tm_score(*ca),
    )


def _apart(x: Tensor, y: Tensor) -> Tensor:
    # The quick way through a matrix product loses the digits that tolerances are read from.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check(predicted: Tensor, true: Tensor, mask: Tensor) -> None:
    if predicted.shape != true.shape or predicted.shape != (*mask.shape, 3):
        raise FoldInputError(
            f"predicted positions {tuple(predicted.shape)}, true ones {tuple(true.shape)} and "
            f"their mask {tuple(mask.shape)} do not fit; positions are the mask's shape and 3"
        )
