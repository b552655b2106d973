"""How templates enter (supplement, section 1.7.1 and algorithms 16 and 17).

Legend: any leading dims, T templates, N residues, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold import kernels
from fivefold.fold.config import AlphaFoldConfig, TemplateConfig
from fivefold.fold.geometry.atoms import distogram
from fivefold.fold.geometry.torsions import atom37_to_torsions
from fivefold.fold.model.blocks import TemplatePairStack
from fivefold.fold.model.features import Features
from fivefold.fold.model.primitives import AttentionCore, LayerNorm, Linear, in_chunks

NUM_TEMPLATE_CLASSES = 22
_SINGLE_CHANNELS = NUM_TEMPLATE_CLASSES + 14 + 14 + 7


class TemplatePairEmbedder(nn.Module):
    """Pair features of templates.

    Args:
        config: of templates.
    """

    def __init__(self, config: TemplateConfig):
        super().__init__()
        self.bins = (config.num_bins, config.first_bin, config.last_bin)
        # Distances, mask of pseudo-beta atoms, both residues, a direction, mask of backbones.
        channels = config.num_bins + 1 + 2 * NUM_TEMPLATE_CLASSES + 3 + 1
        self.linear = Linear(channels, config.c_pair, init="relu")

    def forward(self, features: Features) -> Tensor:
        """(..., T, N, N, C)."""
        beta = features["template_pseudo_beta_mask"]
        backbone = features["template_all_atom_masks"][..., :3].prod(-1)
        backbone_2d = (backbone.unsqueeze(-1) * backbone.unsqueeze(-2)).unsqueeze(-1)
        bins = distogram(features["template_pseudo_beta"], *self.bins)
        residue = F.one_hot(features["template_aatype"].long(), NUM_TEMPLATE_CLASSES).to(bins.dtype)
        num_residues = residue.shape[-2]
        parts = (
            bins,
            (beta.unsqueeze(-1) * beta.unsqueeze(-2)).unsqueeze(-1),
            residue.unsqueeze(-3).expand(*bins.shape[:-1], -1),
            residue.unsqueeze(-2).expand(*bins.shape[:-2], num_residues, -1),
            bins.new_zeros(*bins.shape[:-1], 3),  # the published networks see no direction
            backbone_2d,
        )
        joined = torch.cat(parts, -1) * backbone_2d
        return self.linear(joined.to(self.linear.weight.dtype))


class TemplateSingleEmbedder(nn.Module):
    """Residues and torsions of templates, as further rows of the MSA.

    Args:
        c_m: channels of the MSA representation.
    """

    def __init__(self, c_m: int):
        super().__init__()
        self.linear_1 = Linear(_SINGLE_CHANNELS, c_m, init="relu")
        self.linear_2 = Linear(c_m, c_m, init="relu")

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Rows (..., T, N, C) and their mask (..., T, N): 1 where psi is known."""
        aatype = features["template_aatype"].long()
        torsions = atom37_to_torsions(
            aatype, features["template_all_atom_positions"], features["template_all_atom_masks"]
        )
        sin_cos, other = torsions.sin_cos.flatten(-2), torsions.alternative.flatten(-2)
        residue = F.one_hot(aatype, NUM_TEMPLATE_CLASSES).to(sin_cos.dtype)
        joined = torch.cat((residue, sin_cos, other, torsions.mask), -1)
        hidden = F.relu(self.linear_1(joined.to(self.linear_1.weight.dtype)))
        return self.linear_2(hidden), torsions.mask[..., 2]


class TemplatePointwiseAttention(nn.Module):
    """A pair attends to the same pair of all templates (algorithm 17).

    Args:
        config: of templates.
        c_z: channels of the pair representation.
    """

    def __init__(self, config: TemplateConfig, c_z: int):
        super().__init__()
        inner = config.num_heads * config.head_width
        self.num_heads = config.num_heads
        self.linear_q = Linear(c_z, inner, bias=False, init="glorot")
        self.linear_kv = KeysAndValues(config.c_pair, inner)
        self.linear_o = Linear(inner, c_z, init="zero")
        self.core = AttentionCore()

    def forward(
        self, z: Tensor, t: Tensor, template_mask: Tensor, chunk_size: int | None = None
    ) -> Tensor:
        """The update of z (..., N, N, C) from t (..., T, N, N, C); template_mask (..., T)."""
        t = t.movedim(-4, -2)
        mask = (template_mask > 0).unsqueeze(-2).unsqueeze(-2)

        def some_rows(z: Tensor, t: Tensor) -> Tensor:
            query = self.linear_q(z).unflatten(-1, (self.num_heads, 1, -1))
            t = t.unflatten(-2, (t.shape[-2] // template_mask.shape[-1], -1))
            kv = self.linear_kv(t).unflatten(-1, (2, self.num_heads, -1))
            key, value = (x.transpose(-2, -3) for x in kv.unbind(-3))
            return self.linear_o(self.core(query, key, value, None, mask).flatten(-3))

        # The templates of a pair ride along in the dim of the pair's second residue.
        out = in_chunks(some_rows, (z, t.flatten(-3, -2)), chunk_size)
        any_template = (template_mask.sum(-1) > 0).to(out.dtype)
        return out * any_template[..., None, None, None]


class KeysAndValues(kernels.Linear):
    """Keys and values in one product.

    Args:
        channels: of the input.
        inner: channels of each.
    """

    def __init__(self, channels: int, inner: int):
        self.inner = inner
        super().__init__(channels, 2 * inner, bias=False)

    def reset_parameters(self) -> None:
        """Both as Glorot and Bengio say."""
        nn.init.xavier_uniform_(self.weight[: self.inner])
        nn.init.xavier_uniform_(self.weight[self.inner :])


class TemplateEmbedder(nn.Module):
    """Everything templates give: an update of the pairs and rows of the MSA.

    Args:
        config: of the network, with templates.
        template: of its templates.
    """

    def __init__(self, config: AlphaFoldConfig, template: TemplateConfig):
        super().__init__()
        self.pair_embedder = TemplatePairEmbedder(template)
        self.layer_norm = LayerNorm(template.c_pair)
        self.pointwise_attention = TemplatePointwiseAttention(template, config.c_z)
        self.single_embedder = TemplateSingleEmbedder(config.c_m)

    def forward(
        self,
        features: Features,
        z: Tensor,
        pair_mask: Tensor,
        stack: TemplatePairStack,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The update of z (..., N, N, C).

        Args:
            features: of templates.
            z: pair representation.
            pair_mask: (..., N, N)
            stack: that each template's pairs pass.
            chunk_size: rows at a time.
        """
        t = self.pair_embedder(features)
        mask = pair_mask.unsqueeze(-3).expand(t.shape[:-1])
        t = self.layer_norm(stack(t, mask, chunk_size))
        return self.pointwise_attention(z, t, features["template_mask"].to(z.dtype), chunk_size)
