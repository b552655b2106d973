"""From torsions to frames to atoms, and between the two ways to list atoms.

Legend: any leading dims, N residues, G 8 rigid groups, Q 14 atoms, P 37 atoms.
"""

import torch
from torch import Tensor

from fivefold.fold.geometry.rigid import Rigid
from fivefold.fold.geometry.tables import tables


def torsion_frames(aatype: Tensor, backbone: Rigid, torsions: Tensor) -> Rigid:
    """Frames of the eight rigid groups (supplement, algorithm 24, lines 1 to 10).

    Args:
        aatype: (..., N) numbers of amino acids, at most 20.
        backbone: (..., N) in angstrom.
        torsions: (..., N, 7, 2) sine and cosine of omega, phi, psi, chi1 to chi4.

    Returns:
        (..., N, 8) frames in the coordinates that ``backbone`` leads to.
    """
    known = tables(torsions.device, torsions.dtype)
    at_zero = Rigid.from_4x4(known.frames[aatype])
    own = Rigid(_turned(at_zero.rotation, torsions), at_zero.translation)
    groups = [_group(own, g) for g in range(own.translation.shape[-2])]
    for chi in (5, 6, 7):  # each turns with the one before
        groups[chi] = groups[chi - 1].compose(groups[chi])
    joined = Rigid(
        torch.stack([group.rotation for group in groups], -3),
        torch.stack([group.translation for group in groups], -2),
    )
    return backbone.unsqueeze(-1).compose(joined)


def _group(frames: Rigid, g: int) -> Rigid:
    return Rigid(frames.rotation[..., g, :, :], frames.translation[..., g, :])


def _turned(rotation: Tensor, torsions: Tensor) -> Tensor:
    """Rotations (..., 8, 3, 3), each after a turn about its first axis; the backbone's as it is."""
    x, y, z = rotation[..., 1:, :, :].unbind(-1)
    sin, cos = torsions[..., :1], torsions[..., 1:]
    turned = torch.stack((x, cos * y + sin * z, cos * z - sin * y), -1)
    return torch.cat((rotation[..., :1, :, :], turned), -3)


def frames_to_atom14(aatype: Tensor, frames: Rigid) -> Tensor:
    """Positions (..., N, 14, 3) of the atoms of frames (..., N, 8); 0 where there is no atom."""
    known = tables(frames.translation.device, frames.translation.dtype)
    group = known.group_of_atom14[aatype]
    rotation = _gather(frames.rotation.flatten(-2), group).unflatten(-1, (3, 3))
    moved = Rigid(rotation, _gather(frames.translation, group))
    positions = moved.apply(known.position_of_atom14[aatype])
    return positions * known.atom14_exists[aatype].unsqueeze(-1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Of x (..., N, G, C) the entries (..., N, Q, C) that index (..., N, Q) names."""
    index = index.unsqueeze(-1).expand(*index.shape, x.shape[-1])
    return torch.gather(x.expand(*index.shape[:-2], *x.shape[-2:]), -2, index)


def atom14_to_atom37(aatype: Tensor, atom14: Tensor) -> Tensor:
    """(..., N, 14, C) as (..., N, 37, C), 0 where an amino acid has no such atom."""
    known = tables(atom14.device, atom14.dtype)
    gathered = _gather(atom14, known.atom14_of_atom37[aatype])
    return gathered * known.atom37_exists[aatype].unsqueeze(-1)


def atom37_to_atom14(aatype: Tensor, atom37: Tensor) -> Tensor:
    """(..., N, 37, C) as (..., N, 14, C), 0 where an amino acid has no such atom."""
    known = tables(atom37.device, atom37.dtype)
    gathered = _gather(atom37, known.atom37_of_atom14[aatype])
    return gathered * known.atom14_exists[aatype].unsqueeze(-1)


def pseudo_beta(aatype: Tensor, atom37: Tensor) -> Tensor:
    """Of each residue the beta carbon (..., N, C), and of glycine, which has none, the alpha.

    Args:
        aatype: (..., N)
        atom37: (..., N, 37, C) positions, or a mask with C = 1.
    """
    is_glycine = (aatype == 7).unsqueeze(-1)
    return torch.where(is_glycine, atom37[..., 1, :], atom37[..., 3, :])


def backbone_frames(atom37: Tensor, eps: float = 1e-8) -> Rigid:
    """Frames (..., N) of the backbones of (..., N, 37, 3): C in front of CA, N in the plane."""
    n, ca, c = atom37[..., 0, :], atom37[..., 1, :], atom37[..., 2, :]
    mirrored = 2 * ca - c  # as far behind the alpha carbon as C lies before it
    return Rigid.from_points(mirrored, ca, n, eps)


def distogram(positions: Tensor, num_bins: int, first: float, last: float) -> Tensor:
    """One-hot (..., N, N, num_bins) of distances between positions (..., N, 3).

    Args:
        positions: in angstrom.
        num_bins: how many; the last one has no upper end.
        first: lower end of the first bin.
        last: lower end of the last bin.
    """
    lower = torch.linspace(first, last, num_bins, device=positions.device, dtype=positions.dtype)
    lower = lower.square()
    upper = torch.cat((lower[1:], lower.new_tensor([1e8])))
    apart = positions.unsqueeze(-2) - positions.unsqueeze(-3)
    squared = apart.square().sum(-1, keepdim=True)
    return ((squared > lower) & (squared < upper)).to(positions.dtype)
