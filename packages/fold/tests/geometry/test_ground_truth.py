"""Labels of a structure against AlphaFold's JAX code, and geometry against itself."""

import pytest
import torch
from torch import Tensor

from fivefold.fold.geometry.atoms import (
    atom14_to_atom37,
    atom37_to_atom14,
    frames_to_atom14,
    torsion_frames,
)
from fivefold.fold.geometry.ground_truth import atom_features, supervised_features
from fivefold.fold.geometry.residues import ATOMS, LETTERS, number_of, residues
from fivefold.fold.geometry.rigid import Rigid, quaternion_to_rotation, rotation_to_quaternion
from fivefold.fold.geometry.tables import distance_bounds, tables
from fivefold.fold.geometry.torsions import atom37_to_torsions


def test_labels_are_alphafolds(features: dict[str, Tensor]) -> None:
    found = supervised_features(
        features["aatype"], features["all_atom_positions"], features["all_atom_mask"]
    )
    found |= atom_features(features["aatype"])
    compared = set(found) & set(features)
    assert len(compared) >= 17
    for name in compared - {"backbone_affine_tensor", "rigidgroups_gt_frames",
                            "rigidgroups_alt_gt_frames"}:  # fmt: skip
        assert torch.allclose(found[name], features[name].float(), atol=1e-5), name
    exists = features["rigidgroups_gt_exists"].unsqueeze(-1)
    for name in ("rigidgroups_gt_frames", "rigidgroups_alt_gt_frames"):
        assert torch.allclose(found[name] * exists, features[name] * exists, atol=2e-5), name
    ours, theirs = (Rigid.from_affine(x["backbone_affine_tensor"]) for x in (found, features))
    known = features["backbone_affine_mask"][:, None, None]
    assert torch.allclose(ours.rotation * known, theirs.rotation * known, atol=1e-5)
    assert torch.equal(ours.translation, theirs.translation)


def test_atoms_to_torsions_and_back() -> None:
    torch.manual_seed(0)
    aatype = torch.arange(20)
    angles = torch.randn(20, 7, 2, dtype=torch.float64)
    angles = angles / angles.norm(dim=-1, keepdim=True)
    turn = torch.randn(20, 4, dtype=torch.float64)
    backbone = Rigid(
        quaternion_to_rotation(turn / turn.norm(dim=-1, keepdim=True)),
        torch.randn(20, 3, dtype=torch.float64),
    )
    atoms = frames_to_atom14(aatype, torsion_frames(aatype, backbone, angles))
    atoms37 = atom14_to_atom37(aatype, atoms)
    assert torch.equal(atom37_to_atom14(aatype, atoms37), atoms)
    mask = tables(atoms.device, atoms.dtype).atom37_exists[aatype]
    found = atom37_to_torsions(aatype, atoms37, mask)
    # Idealised positions are rounded to 1e-3 angstrom.
    off = (found.sin_cos - angles).abs().amax(-1) * found.mask
    assert float(off[:, 2:].max()) < 5e-3
    assert torch.equal(found.mask[:, 3:], tables(atoms.device, atoms.dtype).chi_exists[aatype])


def test_quaternions_and_rotations() -> None:
    torch.manual_seed(0)
    quaternion = torch.randn(100, 4, dtype=torch.float64)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    quaternion[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # half a turn
    rotation = quaternion_to_rotation(quaternion)
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.mT, identity)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(100, dtype=torch.float64))
    back = quaternion_to_rotation(rotation_to_quaternion(rotation))
    assert torch.allclose(back, rotation)
    frames = Rigid(rotation, torch.randn(100, 3, dtype=torch.float64))
    points = torch.randn(100, 3, dtype=torch.float64)
    assert torch.allclose(frames.invert_apply(frames.apply(points)), points)
    unit = frames.compose(frames.inverse())
    assert torch.allclose(unit.rotation, identity)
    assert torch.allclose(unit.translation, torch.zeros(100, 3, dtype=torch.float64))


def test_amino_acids() -> None:
    assert len(ATOMS) == 37 and len(LETTERS) == 20
    assert number_of()["TRP"] == LETTERS.index("W") == 17
    assert [len(residue.atoms) for residue in residues()] == [
        *(5, 11, 8, 8, 6, 9, 9, 4, 10, 8, 8, 9, 8, 11, 7, 6, 7, 14, 12, 7)
    ]
    assert sum(len(residue.chi) for residue in residues()) == 39
    with pytest.raises(ValueError, match="SG"):
        residues()[0].index("SG")


def test_bounds_hold_for_ideal_residues() -> None:
    device = torch.device("cpu")
    lower, upper = distance_bounds(1.5, 12.0, device)
    assert torch.equal(lower, lower.mT) and torch.equal(upper, upper.mT)
    # The bond from CA to C of alanine: 1.525 with a deviation of 0.026.
    assert float(lower[0, 1, 2]) == pytest.approx(1.525 - 12 * 0.026, abs=1e-6)
    assert float(upper[0, 1, 2]) == pytest.approx(1.525 + 12 * 0.026, abs=1e-6)
    assert float(upper[20].max()) == 0
