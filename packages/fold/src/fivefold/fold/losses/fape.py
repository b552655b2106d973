"""Frame-aligned point error (supplement, algorithm 28) of backbones and of all atoms.

Legend: any leading dims, L layers, N residues, F frames, P points.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fivefold.fold.config import LossConfig
from fivefold.fold.geometry.rigid import Rigid
from fivefold.fold.losses.parts import Batch

# Under the square root, and added to what is divided by.
_EPS = 1e-4


def frame_aligned_point_error(
    predicted: Rigid,
    target: Rigid,
    frames_mask: Tensor,
    predicted_points: Tensor,
    target_points: Tensor,
    points_mask: Tensor,
    length_scale: float,
    clamp: float | None,
) -> Tensor:
    """Mean distance (...) of points as seen from all frames.

    Args:
        predicted: frames (..., F).
        target: frames (..., F).
        frames_mask: (..., F)
        predicted_points: (..., P, 3) in angstrom.
        target_points: (..., P, 3)
        points_mask: (..., P)
        length_scale: distance that counts as 1, in angstrom.
        clamp: distance above which the error is constant, in angstrom; None for none.
    """
    apart = _seen(predicted, predicted_points) - _seen(target, target_points)
    error = (apart.square().sum(-2) + _EPS).sqrt()
    error = error if clamp is None else error.clamp(max=clamp)
    # Products with the masks as products of matrices: no second tensor of F times P.
    total = (error @ points_mask.unsqueeze(-1)).squeeze(-1)
    total = (total * frames_mask).sum(-1) / length_scale
    return total / (_EPS + frames_mask.sum(-1) * points_mask.sum(-1))


def _seen(frames: Rigid, points: Tensor) -> Tensor:
    """Points in each frame, (..., F, 3, P)."""
    back = frames.inverse()
    turned = back.rotation @ points.mT.unsqueeze(-3)
    return turned + back.translation.unsqueeze(-1)


def backbone_fape(structure: Mapping[str, Any], batch: Batch, config: LossConfig) -> Tensor:
    """FAPE of the backbone (L, ...) after each layer, clamped where the batch says so."""
    predicted = Rigid.from_affine(structure["traj"])
    target = Rigid.from_affine(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]

    def error(clamp: float | None) -> Tensor:
        ends = (predicted.translation, target.translation, mask)
        return frame_aligned_point_error(predicted, target, mask, *ends, config.length_scale, clamp)

    clamped = error(config.clamp)
    if "use_clamped_fape" not in batch:
        return clamped
    use = batch["use_clamped_fape"]
    return clamped * use + error(None) * (1 - use)


def side_chain_fape(
    structure: Mapping[str, Any], batch: Batch, renamed: "Mapping[str, Tensor]", config: LossConfig
) -> Tensor:
    """FAPE (...) of all atoms seen from all rigid groups, after the last layer."""
    frames = Rigid.from_flat12(structure["sidechains"]["frames"][-1].flatten(-3, -2))
    other = renamed["alt_naming_is_better"][..., None, None]
    target = (1 - other) * batch["rigidgroups_gt_frames"] + other * batch[
        "rigidgroups_alt_gt_frames"
    ]
    return frame_aligned_point_error(
        frames,
        Rigid.from_flat12(target.flatten(-3, -2)),
        batch["rigidgroups_gt_exists"].flatten(-2),
        structure["sidechains"]["atom_pos"][-1].flatten(-3, -2),
        renamed["renamed_atom14_gt_positions"].flatten(-3, -2),
        renamed["renamed_atom14_gt_exists"].flatten(-2),
        config.length_scale,
        config.clamp,
    )


def rename(batch: Batch, atom14: Tensor) -> dict[str, Tensor]:
    """Of ambiguous atoms the names that fit the prediction best (algorithm 26).

    Args:
        batch: with the true atoms under both names.
        atom14: predicted positions (..., N, 14, 3).

    Returns:
        "alt_naming_is_better" (..., N), "renamed_atom14_gt_positions" (..., N, 14, 3) and
        "renamed_atom14_gt_exists" (..., N, 14).
    """
    true, other = batch["atom14_gt_positions"], batch["atom14_alt_gt_positions"]
    with torch.no_grad():
        better = (_off(batch, atom14, other) < _off(batch, atom14, true)).to(atom14.dtype)
    pick, mask = better[..., None, None], better[..., None]
    return {
        "alt_naming_is_better": better,
        "renamed_atom14_gt_positions": (1 - pick) * true + pick * other,
        "renamed_atom14_gt_exists": (1 - mask) * batch["atom14_gt_exists"]
        + mask * batch["atom14_alt_gt_exists"],
    }


def _off(batch: Batch, predicted: Tensor, true: Tensor) -> Tensor:
    """By how much distances (..., N) from ambiguous to other atoms are off, summed by residue."""
    exists, ambiguous = batch["atom14_gt_exists"], batch["atom14_atom_is_ambiguous"]
    rows, columns = exists * ambiguous, (exists * (1 - ambiguous)).flatten(-2)
    off = (_between(predicted) - _between(true)).square()
    return (((off + 1e-10).sqrt() @ columns.unsqueeze(-1)).squeeze(-1).unflatten(
        -1, rows.shape[-2:]) * rows).sum(-1)  # fmt: skip


def _between(atom14: Tensor) -> Tensor:
    """Distances of all atoms (..., N 14, N 14)."""
    flat = atom14.flatten(-3, -2)
    apart = flat.unsqueeze(-2) - flat.unsqueeze(-3)
    return (apart.square().sum(-1) + 1e-10).sqrt()
