"""Bonds, angles and clashes that chemistry does not allow (supplement, section 1.9.11).

Legend: any leading dims, N residues, Q 14 atoms.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.fold.config import LossConfig
from fivefold.fold.geometry import residues as facts
from fivefold.fold.geometry.tables import distance_bounds, tables
from fivefold.fold.losses.parts import Batch

_PROLINE = facts.LETTERS.index("P")
_SULFUR_OF_CYSTEINE = 5


@dataclass(frozen=True, slots=True)
class Bonds:
    """How far bonds between residues are from what they should be.

    Attributes:
        c_n: mean (...) excess of the length from C to the next N.
        ca_c_n: mean (...) excess of the cosine of the angle CA, C, N.
        c_n_ca: mean (...) excess of the cosine of the angle C, N, CA.
        violated: (..., N) 1 for residues beside a bond that is off.
    """

    c_n: Tensor
    ca_c_n: Tensor
    c_n_ca: Tensor
    violated: Tensor


@dataclass(frozen=True, slots=True)
class Clashes:
    """How far atoms are beyond their bounds.

    Attributes:
        loss: (..., N, 14) sum over the other atoms, in angstrom.
        violated: (..., N, 14) 1 for atoms that are.
    """

    loss: Tensor
    violated: Tensor


def violation_loss(atom14: Tensor, batch: Batch, config: LossConfig) -> Tensor:
    """The sum (...) of all of it; atom14 (..., N, 14, 3) in angstrom."""
    bonds, between, within = find_violations(atom14, batch, config)
    exists = _exists(atom14, batch)
    clashes = (between.loss + within.loss).sum((-2, -1)) / (1e-6 + exists.sum((-2, -1)))
    return bonds.c_n + bonds.ca_c_n + bonds.c_n_ca + clashes


def find_violations(
    atom14: Tensor, batch: Batch, config: LossConfig
) -> tuple[Bonds, Clashes, Clashes]:
    """Bonds between residues, clashes between residues, and bounds within residues.

    Args:
        atom14: predicted positions (..., N, 14, 3).
        batch: with "aatype" and "residue_index".
        config: with the tolerances.
    """
    exists = _exists(atom14, batch)
    bonds = bond_violations(atom14, exists, batch, config.violation_deviations)
    between = clashes_between(atom14, exists, batch, config.clash_tolerance)
    bounds = distance_bounds(config.clash_tolerance, config.violation_deviations, atom14.device)
    aatype = batch["aatype"].long()
    within = clashes_within(atom14, exists, bounds[0][aatype], bounds[1][aatype])
    return bonds, between, within


def violated_residues(atom14: Tensor, batch: Batch, config: LossConfig) -> Tensor:
    """1 for residues (..., N) with a violation of any kind."""
    bonds, between, within = find_violations(atom14, batch, config)
    atoms = torch.maximum(between.violated, within.violated).amax(-1)
    return torch.maximum(bonds.violated, atoms)


def _exists(atom14: Tensor, batch: Batch) -> Tensor:
    known = tables(atom14.device, atom14.dtype).atom14_exists[batch["aatype"].long()]
    return known * batch["seq_mask"].unsqueeze(-1)


def bond_violations(atom14: Tensor, exists: Tensor, batch: Batch, deviations: float) -> Bonds:
    """Lengths and angles of the bonds from each residue to the next in number.

    Args:
        atom14: (..., N, 14, 3)
        exists: (..., N, 14)
        batch: with "aatype" and "residue_index".
        deviations: by which they may be off, in standard deviations.
    """
    ca, c = atom14[..., :-1, 1, :], atom14[..., :-1, 2, :]
    n, next_ca = atom14[..., 1:, 0, :], atom14[..., 1:, 1, :]
    is_next = (batch["residue_index"].diff(dim=-1) == 1).to(atom14.dtype)
    has_bond = exists[..., :-1, 2] * exists[..., 1:, 0] * is_next
    to_n, length = _direction(n - c)
    to_ca, _ = _direction(ca - c)
    to_next_ca, _ = _direction(next_ca - n)
    is_proline = (batch["aatype"][..., 1:] == _PROLINE).to(atom14.dtype)
    usual, before_proline = facts.C_N_LENGTH, facts.C_N_LENGTH_BEFORE_PROLINE
    mean, spread = (
        (1 - is_proline) * a + is_proline * b for a, b in zip(usual, before_proline, strict=True)
    )
    parts = (
        (has_bond, _off(length, mean), deviations * spread),
        # As in AlphaFold, with the deviation of the length of the bond.
        (
            has_bond * exists[..., :-1, 1],
            _off((to_ca * to_n).sum(-1), facts.CA_C_N_COSINE[0]),
            deviations * usual[1],
        ),
        (
            has_bond * exists[..., 1:, 1],
            _off((-to_n * to_next_ca).sum(-1), facts.C_N_CA_COSINE[0]),
            deviations * facts.C_N_CA_COSINE[1],
        ),
    )
    c_n, ca_c_n, c_n_ca = (_mean(mask, F.relu(off - limit)) for mask, off, limit in parts)
    violated = torch.stack([mask * (off > limit) for mask, off, limit in parts]).amax(0)
    beside = torch.maximum(F.pad(violated, (0, 1)), F.pad(violated, (1, 0)))
    return Bonds(c_n, ca_c_n, c_n_ca, beside)


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    length = (x.square().sum(-1) + 1e-6).sqrt()
    return x / length.unsqueeze(-1), length


def _off(value: Tensor, mean: Tensor | float) -> Tensor:
    return ((value - mean).square() + 1e-6).sqrt()


def _mean(mask: Tensor, value: Tensor) -> Tensor:
    return (mask * value).sum(-1) / (mask.sum(-1) + 1e-6)


def clashes_between(atom14: Tensor, exists: Tensor, batch: Batch, tolerance: float) -> Clashes:
    """Atoms of different residues inside each other, but for bonds and disulfide bridges.

    Args:
        atom14: (..., N, 14, 3)
        exists: (..., N, 14)
        batch: with "aatype" and "residue_index".
        tolerance: by which radii may overlap, in angstrom.
    """
    aatype, index = batch["aatype"].long(), batch["residue_index"]
    num_residues = atom14.shape[-3]
    flat, there = atom14.flatten(-3, -2), exists.flatten(-2)
    apart = flat.unsqueeze(-2) - flat.unsqueeze(-3)
    distance = (apart.square().sum(-1) + 1e-10).sqrt()
    before = index.unsqueeze(-1) < index.unsqueeze(-2)
    bonded = (index.unsqueeze(-1) + 1) == index.unsqueeze(-2)
    mask = _by_atom(before) * (there.unsqueeze(-1) * there.unsqueeze(-2))
    place = torch.arange(14, device=atom14.device).repeat(num_residues)
    peptide = (place.unsqueeze(-1) == 2) & (place == 0) & _by_atom(bonded)
    sulfur = place == _SULFUR_OF_CYSTEINE
    mask = mask * ~peptide * ~(sulfur.unsqueeze(-1) & sulfur)
    radius = (tables(atom14.device, atom14.dtype).radius_of_atom14[aatype] * exists).flatten(-2)
    limit = mask * (radius.unsqueeze(-1) + radius.unsqueeze(-2)) - tolerance
    inside = mask * F.relu(limit - distance)
    clashes = mask * (distance < limit)
    return Clashes(
        (inside.sum(-1) + inside.sum(-2)).unflatten(-1, (num_residues, 14)),
        torch.maximum(clashes.amax(-1), clashes.amax(-2)).unflatten(-1, (num_residues, 14)),
    )


def _by_atom(x: Tensor) -> Tensor:
    """(..., N, N) of residues to (..., N 14, N 14) of their atoms."""
    return x.repeat_interleave(14, -1).repeat_interleave(14, -2)


def clashes_within(atom14: Tensor, exists: Tensor, lower: Tensor, upper: Tensor) -> Clashes:
    """Atoms of one residue too near to or too far from each other.

    Args:
        atom14: (..., N, 14, 3)
        exists: (..., N, 14)
        lower: bounds (..., N, 14, 14), in angstrom.
        upper: likewise.
    """
    apart = atom14.unsqueeze(-2) - atom14.unsqueeze(-3)
    distance = (apart.square().sum(-1) + 1e-10).sqrt()
    itself = torch.eye(14, dtype=atom14.dtype, device=atom14.device)
    mask = (1 - itself) * exists.unsqueeze(-1) * exists.unsqueeze(-2)
    off = mask * (F.relu(lower - distance) + F.relu(distance - upper))
    wrong = mask * ((distance < lower) | (distance > upper))
    return Clashes(off.sum(-1) + off.sum(-2), torch.maximum(wrong.amax(-1), wrong.amax(-2)))
