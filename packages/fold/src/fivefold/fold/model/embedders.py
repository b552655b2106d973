"""What comes before the stacks (supplement, algorithms 3 to 5, 32, and lines 7 to 16 of 2).

Legend: any leading dims, S sequences, E extra sequences, N residues, T templates, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.geometry.atoms import distogram, pseudo_beta
from fivefold.fold.model.features import (
    EXTRA_MSA_CHANNELS,
    MSA_CHANNELS,
    TARGET_CHANNELS,
    Features,
    extra_msa_features,
)
from fivefold.fold.model.primitives import LayerNorm, Linear


class InputEmbedder(nn.Module):
    """First MSA and pair representations of sequence, alignment and relative positions.

    Args:
        config: of the network.
    """

    def __init__(self, config: AlphaFoldConfig):
        super().__init__()
        self.reach = config.max_relative_position
        self.linear_z_i = Linear(TARGET_CHANNELS, config.c_z)
        self.linear_z_j = Linear(TARGET_CHANNELS, config.c_z)
        self.linear_target_m = Linear(TARGET_CHANNELS, config.c_m)
        self.linear_msa_m = Linear(MSA_CHANNELS, config.c_m)
        self.linear_relative = Linear(2 * config.max_relative_position + 1, config.c_z)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """The m (..., S, N, C) and z (..., N, N, C)."""
        dtype = self.linear_msa_m.weight.dtype
        target = features["target_feat"].to(dtype)
        msa = self.linear_msa_m(features["msa_feat"].to(dtype))
        m = msa + self.linear_target_m(target).unsqueeze(-3)
        z = self.linear_z_i(target).unsqueeze(-2) + self.linear_z_j(target).unsqueeze(-3)
        return m, z + self._relative(features)

    def _relative(self, features: Features) -> Tensor:
        """Embedding (..., N, N, C) of how far residues are apart, clipped."""
        offset = _apart(features["residue_index"].long())
        offset = (offset + self.reach).clamp(0, 2 * self.reach)
        if "asym_id" in features:
            chains = _apart(features["asym_id"].long())
            far = torch.where(chains > 0, 2 * self.reach, 0)
            offset = torch.where(chains == 0, offset, far)
        # A row of the weight is what the product with a one-hot vector would find.
        weight = self.linear_relative.weight
        return F.embedding(offset, weight.T) + self.linear_relative.bias


def _apart(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) - x.unsqueeze(-2)


class RecyclingEmbedder(nn.Module):
    """What the iteration before found (algorithm 32).

    Args:
        config: of the network.
    """

    def __init__(self, config: AlphaFoldConfig):
        super().__init__()
        self.bins = (config.num_recycle_bins, config.first_recycle_bin, config.last_recycle_bin)
        self.linear = Linear(config.num_recycle_bins, config.c_z)
        self.layer_norm_m = LayerNorm(config.c_m)
        self.layer_norm_z = LayerNorm(config.c_z)

    def forward(
        self, aatype: Tensor, first_row: Tensor, z: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updates of the first row of m (..., N, C) and of z (..., N, N, C).

        Args:
            aatype: (..., N)
            first_row: of m after the stacks, (..., N, C); 0 before the first iteration.
            z: after the stacks, (..., N, N, C).
            positions: of all atoms (..., N, 37, 3), in angstrom.
        """
        bins = distogram(pseudo_beta(aatype, positions), *self.bins)
        update = self.linear(bins.to(self.linear.weight.dtype)) + self.layer_norm_z(z)
        return self.layer_norm_m(first_row), update


class ExtraMSAEmbedder(nn.Module):
    """Representation of the extra sequences.

    Args:
        c_e: its channels.
    """

    def __init__(self, c_e: int):
        super().__init__()
        self.linear = Linear(EXTRA_MSA_CHANNELS, c_e)

    def forward(self, features: Features) -> Tensor:
        """(..., E, N, C)."""
        return self.linear(extra_msa_features(features, self.linear.weight.dtype))
