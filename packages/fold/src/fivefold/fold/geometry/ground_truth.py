"""Everything the losses ask of a known structure, from its atoms.

Legend: any leading dims, N residues, P 37 atoms, Q 14 atoms, G 8 rigid groups.
"""

import torch
from torch import Tensor

from fivefold.fold.geometry.atoms import atom37_to_atom14, backbone_frames, pseudo_beta
from fivefold.fold.geometry.rigid import Rigid, rotation_to_quaternion
from fivefold.fold.geometry.tables import tables
from fivefold.fold.geometry.torsions import atom37_to_torsions


def supervised_features(aatype: Tensor, positions: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Features of the true structure, named as in AlphaFold 2; see ``model.features``.

    Args:
        aatype: (..., N) numbers of amino acids, at most 20.
        positions: (..., N, 37, 3) in angstrom.
        mask: (..., N, 37) 1 where an atom was seen.
    """
    torsions = atom37_to_torsions(aatype, positions, mask)
    sin_chi, cos_chi = torsions.sin_cos[..., 3:, :].unbind(-1)
    beta_mask = pseudo_beta(aatype, mask.unsqueeze(-1)).squeeze(-1)
    return {
        "pseudo_beta": pseudo_beta(aatype, positions),
        "pseudo_beta_mask": beta_mask,
        "chi_angles": torch.atan2(sin_chi, cos_chi) * torsions.mask[..., 3:],
        "chi_mask": torsions.mask[..., 3:],
        **backbone_features(positions, mask),
        **atom14_features(aatype, positions, mask),
        **group_features(aatype, positions, mask),
    }


def atom_features(aatype: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Which atoms the amino acids (..., N) have, and how the two lists of them correspond."""
    known = tables(aatype.device, dtype)
    return {
        "atom14_atom_exists": known.atom14_exists[aatype],
        "atom37_atom_exists": known.atom37_exists[aatype],
        "residx_atom14_to_atom37": known.atom37_of_atom14[aatype],
        "residx_atom37_to_atom14": known.atom14_of_atom37[aatype],
    }


def backbone_features(positions: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Frames of the backbone as (..., N, 7), and where N, CA and C are all known."""
    frames = backbone_frames(positions)
    quaternion = rotation_to_quaternion(frames.rotation)
    return {
        "backbone_affine_tensor": torch.cat((quaternion, frames.translation), -1),
        "backbone_affine_mask": mask[..., :3].prod(-1),
    }


def atom14_features(aatype: Tensor, positions: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Atoms in the dense list, and the same after ambiguous ones changed names."""
    known = tables(positions.device, positions.dtype)
    dense_mask = atom37_to_atom14(aatype, mask.unsqueeze(-1)).squeeze(-1)
    dense = atom37_to_atom14(aatype, positions) * dense_mask.unsqueeze(-1)
    swapped = known.swapped_atom14[aatype]
    return {
        "atom14_gt_positions": dense,
        "atom14_gt_exists": dense_mask,
        "atom14_alt_gt_positions": torch.take_along_dim(dense, swapped.unsqueeze(-1), -2),
        "atom14_alt_gt_exists": torch.take_along_dim(dense_mask, swapped, -1),
        "atom14_atom_is_ambiguous": known.atom14_is_ambiguous[aatype],
    }


def group_features(aatype: Tensor, positions: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Frames of the eight rigid groups as (..., N, 8, 12), and after the change of names."""
    known = tables(positions.device, positions.dtype)
    atoms = known.group_base_atoms[aatype].flatten(-2)
    base = torch.take_along_dim(positions, atoms.unsqueeze(-1), -2).unflatten(-2, (-1, 3))
    base_mask = torch.take_along_dim(mask, atoms, -1).unflatten(-1, (-1, 3)).prod(-1)
    frames = Rigid.from_points(base[..., 0, :], base[..., 1, :], base[..., 2, :])
    # The backbone's first axis points at C, the others' away from their first atom.
    flip = frames.rotation.new_ones(8, 3)
    flip[0, 0] = flip[0, 2] = -1
    frames = Rigid(frames.rotation * flip.unsqueeze(-2), frames.translation)
    ambiguous = known.group_is_ambiguous[aatype]
    # The other name of an atom is half a turn about the first axis away.
    turn = torch.ones_like(frames.translation)
    turn[..., 1:] -= 2 * ambiguous.unsqueeze(-1)
    other = Rigid(frames.rotation * turn.unsqueeze(-2), frames.translation)
    exists = known.group_exists[aatype]
    return {
        "rigidgroups_gt_frames": frames.flat12(),
        "rigidgroups_alt_gt_frames": other.flat12(),
        "rigidgroups_gt_exists": base_mask * exists,
        "rigidgroups_group_exists": exists,
        "rigidgroups_group_is_ambiguous": ambiguous,
    }
