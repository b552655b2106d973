"""Losses of the heads (supplement, sections 1.9.6 to 1.9.10).

Legend: any leading dims, S sequences, N residues, B bins, P 37 atoms.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fivefold.fold.config import LossConfig
from fivefold.fold.geometry.rigid import Rigid
from fivefold.fold.geometry.tables import tables
from fivefold.fold.losses.parts import (
    Batch,
    binary_cross_entropy,
    cross_entropy,
    distances,
    is_resolved,
)

Head = Mapping[str, Tensor]


def distogram_loss(head: Head, batch: Batch) -> Tensor:
    """Cross entropy (...) of binned distances between pseudo-beta atoms."""
    apart = batch["pseudo_beta"].unsqueeze(-2) - batch["pseudo_beta"].unsqueeze(-3)
    squared = apart.square().sum(-1, keepdim=True)
    bins = (squared > head["bin_edges"].square()).sum(-1)
    mask = _pairs(batch["pseudo_beta_mask"])
    errors = cross_entropy(head["logits"], bins)
    return (errors * mask).sum((-2, -1)) / (1e-6 + mask.sum((-2, -1)))


def masked_msa_loss(head: Head, batch: Batch) -> Tensor:
    """Cross entropy (...) of the residues of the MSA that were masked."""
    mask = batch["bert_mask"]
    errors = cross_entropy(head["logits"], batch["true_msa"].long())
    return (errors * mask).sum((-2, -1)) / (1e-8 + mask.sum((-2, -1)))


def experimentally_resolved_loss(head: Head, batch: Batch, config: LossConfig) -> Tensor:
    """Cross entropy (...) of whether each atom of a residue was seen."""
    seen = batch["all_atom_mask"]
    exists = tables(seen.device, seen.dtype).atom37_exists[batch["aatype"].long()]
    exists = exists * batch["seq_mask"].unsqueeze(-1)
    errors = binary_cross_entropy(head["logits"], seen)
    loss = (errors * exists).sum((-2, -1)) / (1e-8 + exists.sum((-2, -1)))
    return loss * is_resolved(batch, config.min_resolution, config.max_resolution)


def plddt_loss(
    head: Head, structure: Mapping[str, Any], batch: Batch, config: LossConfig
) -> Tensor:
    """Cross entropy (...) of the binned lDDT of alpha carbons."""
    mask = batch["all_atom_mask"][..., 1]
    score = lddt_per_residue(
        structure["final_atom_positions"][..., 1, :].detach(),
        batch["all_atom_positions"][..., 1, :],
        mask,
    )
    num_bins = head["logits"].shape[-1]
    bins = (score * num_bins).floor().long().clamp(max=num_bins - 1)
    errors = cross_entropy(head["logits"], bins)
    loss = (errors * mask).sum(-1) / (1e-8 + mask.sum(-1))
    return loss * is_resolved(batch, config.min_resolution, config.max_resolution)


def lddt_per_residue(predicted: Tensor, true: Tensor, mask: Tensor, cutoff: float = 15.0) -> Tensor:
    """Share (..., N) of distances to close neighbours that are right, at four tolerances.

    Args:
        predicted: positions (..., N, 3).
        true: positions (..., N, 3), in angstrom.
        mask: (..., N) 1 where the truth is known.
        cutoff: of what is close, in angstrom.
    """
    true_apart = distances(true)
    itself = torch.eye(mask.shape[-1], dtype=mask.dtype, device=mask.device)
    scored = (true_apart < cutoff) * _pairs(mask) * (1 - itself)
    off = (true_apart - distances(predicted)).abs()
    right = sum((off < limit).to(mask.dtype) for limit in (0.5, 1.0, 2.0, 4.0))
    return (1e-10 + (scored * right / 4).sum(-1)) / (1e-10 + scored.sum(-1))


def aligned_error_loss(
    head: Head, structure: Mapping[str, Any], batch: Batch, config: LossConfig
) -> Tensor:
    """Cross entropy (...) of the binned error of each residue seen from each other's frame."""
    predicted = Rigid.from_affine(structure["final_affines"].detach())
    true = Rigid.from_affine(batch["backbone_affine_tensor"])
    apart = _mutual(predicted) - _mutual(true)
    squared = apart.square().sum(-1, keepdim=True)
    bins = (squared > head["breaks"].square()).sum(-1)
    mask = _pairs(batch["backbone_affine_mask"])
    errors = cross_entropy(head["logits"], bins)
    loss = (errors * mask).sum((-2, -1)) / (1e-8 + mask.sum((-2, -1)))
    return loss * is_resolved(batch, config.min_resolution, config.max_resolution)


def _mutual(frames: Rigid) -> Tensor:
    """Origins (..., N, N, 3) of frames as seen from each."""
    return frames.unsqueeze(-1).invert_apply(frames.translation.unsqueeze(-3))


def _pairs(mask: Tensor) -> Tensor:
    return mask.unsqueeze(-1) * mask.unsqueeze(-2)
