"""Torsion angles of known structures (supplement, section 1.2.4, table 1).

Legend: any leading dims, N residues, P 37 atoms.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.fold.geometry.rigid import Rigid
from fivefold.fold.geometry.tables import tables


@dataclass(frozen=True, slots=True)
class Torsions:
    """Omega, phi, psi and chi1 to chi4 of residues.

    Attributes:
        sin_cos: (..., N, 7, 2)
        alternative: (..., N, 7, 2) the same after ambiguous atoms changed names.
        mask: (..., N, 7) 1 where all four atoms are known.
    """

    sin_cos: Tensor
    alternative: Tensor
    mask: Tensor


def atom37_to_torsions(aatype: Tensor, positions: Tensor, mask: Tensor) -> Torsions:
    """Torsions of atoms.

    Args:
        aatype: (..., N); numbers above 20 count as unknown.
        positions: (..., N, 37, 3) in angstrom.
        mask: (..., N, 37) 1 where an atom is known.
    """
    known = tables(positions.device, positions.dtype)
    aatype = aatype.clamp(max=20)
    before, before_mask = _previous(positions, 3), _previous(mask, 2)
    atoms = known.chi_atoms[aatype].flatten(-2)
    chi = torch.take_along_dim(positions, atoms.unsqueeze(-1), -2).unflatten(-2, (4, 4))
    chi_mask = torch.take_along_dim(mask, atoms, -1).unflatten(-1, (4, 4)).prod(-1)
    chi_mask = chi_mask * known.chi_exists[aatype]
    points = torch.cat((_backbone(before, positions, -2), chi), -3)
    backbone_mask = _backbone(before_mask.unsqueeze(-1), mask.unsqueeze(-1), -2)
    sin_cos = _dihedral(points)
    # The oxygen lies across from the next nitrogen, which psi is about.
    signs = sin_cos.new_tensor([1, 1, -1, 1, 1, 1, 1]).unsqueeze(-1)
    sin_cos = sin_cos * signs
    mirror = 1 - 2 * known.chi_pi_periodic[aatype]
    mirror = torch.cat((torch.ones_like(mirror[..., :3]), mirror), -1)
    return Torsions(
        sin_cos,
        sin_cos * mirror.unsqueeze(-1),
        torch.cat((backbone_mask.squeeze(-1).prod(-1), chi_mask), -1),
    )


def _previous(x: Tensor, num_dims: int) -> Tensor:
    """Of each residue what the one before it has; 0 for the first."""
    dim = x.dim() - num_dims
    return torch.cat(
        (torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)), dim
    )


def _backbone(before: Tensor, this: Tensor, dim: int) -> Tensor:
    """The atoms (..., N, 3, 4, C) of omega, phi and psi."""
    omega = torch.cat((before[..., 1:3, :], this[..., 0:2, :]), dim)
    phi = torch.cat((before[..., 2:3, :], this[..., 0:3, :]), dim)
    psi = torch.cat((this[..., 0:3, :], this[..., 4:5, :]), dim)
    return torch.stack((omega, phi, psi), -3)


def _dihedral(points: Tensor) -> Tensor:
    """Sine and cosine (..., 2) of the torsions of four points (..., 4, 3)."""
    first, second, third, fourth = points.unbind(-2)
    seen = Rigid.from_points(second, third, first).invert_apply(fourth)
    sin_cos = torch.stack((seen[..., 2], seen[..., 1]), -1)
    return sin_cos / (sin_cos.square().sum(-1, keepdim=True) + 1e-8).sqrt()
