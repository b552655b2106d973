"""Heads beside the structure module (supplement, sections 1.9.6 to 1.9.10).

Legend: any leading dims, S sequences, N residues, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.geometry.residues import ATOMS, NUM_MSA_CLASSES
from fivefold.fold.model.primitives import LayerNorm, Linear


class PredictedLDDTHead(nn.Module):
    """How good each residue's place is (algorithm 29).

    Args:
        c_s: channels of the structure module's single representation.
        c_hidden: of the hidden layers.
        num_bins: of lDDT between 0 and 1.
    """

    def __init__(self, c_s: int, c_hidden: int, num_bins: int):
        super().__init__()
        self.layer_norm = LayerNorm(c_s)
        self.linear_1 = Linear(c_s, c_hidden, init="relu")
        self.linear_2 = Linear(c_hidden, c_hidden, init="relu")
        self.linear_3 = Linear(c_hidden, num_bins, init="zero")

    def forward(self, s: Tensor) -> Tensor:
        """Logits (..., N, num_bins) of s (..., N, C)."""
        hidden = F.relu(self.linear_1(self.layer_norm(s)))
        return self.linear_3(F.relu(self.linear_2(hidden)))


class Heads(nn.Module):
    """All heads, on the representations as float32 or wider.

    Args:
        config: of the network.
    """

    def __init__(self, config: AlphaFoldConfig):
        super().__init__()
        heads = config.heads
        self.distances = (heads.first_distance, heads.last_distance, heads.num_distance_bins - 1)
        self.errors = (0.0, heads.last_error, heads.num_error_bins - 1)
        self.predicted_lddt = PredictedLDDTHead(config.c_s, heads.c_lddt, heads.num_lddt_bins)
        self.distogram = Linear(config.c_z, heads.num_distance_bins, init="zero")
        self.masked_msa = Linear(config.c_m, NUM_MSA_CLASSES, init="zero")
        self.experimentally_resolved = Linear(config.c_s, len(ATOMS), init="zero")
        self.predicted_aligned_error: nn.Module | None = None
        if heads.aligned_error:
            self.predicted_aligned_error = Linear(config.c_z, heads.num_error_bins, init="zero")

    def forward(
        self, m: Tensor, z: Tensor, s: Tensor, structure: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """Logits of each head, and where its bins end, named as in AlphaFold 2.

        Args:
            m: MSA representation (..., S, N, C) without the rows of templates.
            z: pair representation (..., N, N, C).
            s: single representation (..., N, C).
            structure: that of the structure module (..., N, C).
        """
        half = self.distogram(z)
        edges = torch.linspace(*self.distances, device=z.device, dtype=z.dtype)
        outputs = {
            "masked_msa": {"logits": self.masked_msa(m)},
            "distogram": {"logits": half + half.transpose(-2, -3), "bin_edges": edges},
            "predicted_lddt": {"logits": self.predicted_lddt(structure)},
            "experimentally_resolved": {"logits": self.experimentally_resolved(s)},
        }
        if self.predicted_aligned_error is not None:
            breaks = torch.linspace(*self.errors, device=z.device, dtype=z.dtype)
            logits = self.predicted_aligned_error(z)
            outputs["predicted_aligned_error"] = {"logits": logits, "breaks": breaks}
        return outputs
