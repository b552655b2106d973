"""Loss of side-chain torsions (supplement, algorithm 27).

Legend: any leading dims, L layers, N residues.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fivefold.fold.geometry.tables import tables
from fivefold.fold.losses.parts import Batch, masked_mean


def torsion_losses(structure: Mapping[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared error (...) of the side chains' torsions, and how far from 1 their length is.

    Args:
        structure: outputs of the structure module.
        batch: with "chi_angles", "chi_mask", "seq_mask" and "aatype".
    """
    angles = structure["sidechains"]["angles_sin_cos"][..., 3:, :]
    chi = batch["chi_angles"]
    true = torch.stack((chi.sin(), chi.cos()), -1)
    periodic = tables(chi.device, chi.dtype).chi_pi_periodic[batch["aatype"].long()]
    turned = true * (1 - 2 * periodic).unsqueeze(-1)
    error = torch.minimum((true - angles).square().sum(-1), (turned - angles).square().sum(-1))
    raw = structure["sidechains"]["unnormalized_angles_sin_cos"]
    length = (raw.square().sum(-1) + 1e-6).sqrt()
    # Over layers, residues and torsions; leading dims of a batch stay.
    dims = (0, -2, -1)
    return (
        masked_mean(batch["chi_mask"], error, dims),
        masked_mean(batch["seq_mask"].unsqueeze(-1), (length - 1).abs(), dims),
    )
