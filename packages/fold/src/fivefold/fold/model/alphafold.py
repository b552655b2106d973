"""The network from features to structure, with recycling (supplement, algorithm 2).

Legend: any leading dims, S sequences, N residues, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.errors import FoldInputError
from fivefold.fold.model import features as feature_names
from fivefold.fold.model.blocks import EvoformerStack, Masks, TemplatePairStack
from fivefold.fold.model.embedders import ExtraMSAEmbedder, InputEmbedder, RecyclingEmbedder
from fivefold.fold.model.features import Features
from fivefold.fold.model.heads import Heads
from fivefold.fold.model.primitives import Linear
from fivefold.fold.model.structure import StructureModule
from fivefold.fold.model.templates import TemplateEmbedder
from fivefold.fold.params.pretrained import Pretrained


@dataclass(frozen=True, slots=True)
class Previous:
    """What an iteration hands to the next.

    Attributes:
        first_row: of the MSA representation (..., N, C).
        pair: representation (..., N, N, C).
        positions: of all atoms (..., N, 37, 3), in angstrom.
    """

    first_row: Tensor
    pair: Tensor
    positions: Tensor

    @classmethod
    def of(cls, outputs: Mapping[str, Any]) -> Self:
        """From the outputs of an iteration, without their gradients."""
        representations = outputs["representations"]
        return cls(
            representations["msa_first_row"].detach(),
            representations["pair"].detach(),
            outputs["structure_module"]["final_atom_positions"].detach(),
        )


class AlphaFold(Pretrained):
    """AlphaFold 2 for single chains.

    Args:
        config: of the network.

    Attributes:
        chunk_size: rows that layers work on at a time where no gradient is asked for, None for
            all; bounds the memory of long chains and changes no result.
        recompute_regions: for ``fivefold.parallel_core.regions.recompute``; "full" keeps of each
            block only its input.

    Example:
        >>> model = AlphaFold(preset("model_1").model)            # doctest: +SKIP
        >>> outputs = model(features, num_recycles=3)             # doctest: +SKIP
        >>> outputs["structure_module"]["final_atom_positions"]   # doctest: +SKIP
    """

    # Modules whose parameters are not rounded where the rest computes in 16 bits.
    full_precision: Sequence[str] = ("structure_module", "heads")
    recompute_regions: Mapping[str, str] = {
        "layer": "*.blocks.*",
        "attention_core": "*.blocks.*.*.attention.core",
    }

    def __init__(self, config: AlphaFoldConfig):
        super().__init__(config)
        self.chunk_size: int | None = None
        self.input_embedder = InputEmbedder(config)
        self.recycling_embedder = RecyclingEmbedder(config)
        self.template_embedder: TemplateEmbedder | None = None
        if config.template is not None:
            self.template_embedder = TemplateEmbedder(config, config.template)
            self.template_pair_stack = TemplatePairStack(
                config.template.stack, config.template.c_pair
            )
        self.extra_msa_embedder = ExtraMSAEmbedder(config.c_e)
        self.extra_msa_stack = EvoformerStack(
            config.extra_msa, config.c_e, config.c_z, is_extra=True
        )
        self.evoformer = EvoformerStack(config.evoformer, config.c_m, config.c_z)
        self.linear_single = Linear(config.c_m, config.c_s)
        self.structure_module = StructureModule(config.structure, config.c_s, config.c_z)
        self.heads = Heads(config)

    def forward(
        self,
        features: Features | Sequence[Features],
        num_recycles: int | None = None,
        previous: Previous | None = None,
    ) -> dict[str, Any]:
        """Predict; gradients reach the last iteration only.

        Args:
            features: for all iterations, or one mapping for each; see ``model.features``.
            num_recycles: iterations before the last one; 0 by default, and one less than there
                are mappings where there are several.
            previous: of an iteration made earlier; None to start from nothing.

        Returns:
            "representations" (msa, pair, single, msa_first_row, structure_module),
            "structure_module", "distogram", "masked_msa", "predicted_lddt",
            "experimentally_resolved" and, where the network has that head,
            "predicted_aligned_error": each a mapping whose names are AlphaFold 2's.

        Raises:
            FoldInputError: features are missing or do not fit, or the numbers contradict.
        """
        cycles = _cycles(features, num_recycles)
        for each in {id(each): each for each in cycles}.values():
            feature_names.check(each, self.template_embedder is not None)
        with torch.no_grad():
            for each in cycles[:-1]:
                previous = Previous.of(self.iteration(each, previous))
        return self.iteration(cycles[-1], previous)

    def iteration(self, features: Features, previous: Previous | None = None) -> dict[str, Any]:
        """One pass through the network; see ``forward``."""
        m, z, masks = self.embed(features, previous)
        num_sequences = features["msa_feat"].shape[-3]
        m, z = self.evoformer(m, z, masks, self._chunks())
        first_row = m[..., 0, :, :]
        s = self.linear_single(first_row)
        # Coordinates and logits do not survive 16 bits.
        m, z, s = (_wide(x) for x in (m[..., :num_sequences, :, :], z, s))
        structure = self.structure_module(
            s, z, features["aatype"].long(), features["seq_mask"].to(s.dtype)
        )
        act = structure.pop("act")
        return {
            "representations": {
                "msa": m,
                "pair": z,
                "single": s,
                "msa_first_row": _wide(first_row),
                "structure_module": act,
            },
            "structure_module": structure,
            **self.heads(m, z, s, act),
        }

    def embed(self, features: Features, previous: Previous | None) -> tuple[Tensor, Tensor, Masks]:
        """Representations before the main stack, with rows of templates, and their masks."""
        m, z = self.input_embedder(features)
        m, z = self._recycle(features, m, z, previous)
        mask = features["seq_mask"].to(z.dtype)
        pair_mask = mask.unsqueeze(-1) * mask.unsqueeze(-2)
        msa_mask = features["msa_mask"].to(z.dtype)
        if self.template_embedder is not None:
            stack = self.template_pair_stack
            z = z + self.template_embedder(features, z, pair_mask, stack, self._chunks())
            rows, rows_mask = self.template_embedder.single_embedder(features)
            m = torch.cat((m, rows), -3)
            msa_mask = torch.cat((msa_mask, rows_mask.to(msa_mask.dtype)), -2)
        extra_masks = Masks.of(features["extra_msa_mask"].to(z.dtype), pair_mask)
        _, z = self.extra_msa_stack(
            self.extra_msa_embedder(features), z, extra_masks, self._chunks()
        )
        return m, z, Masks.of(msa_mask, pair_mask)

    def _recycle(
        self, features: Features, m: Tensor, z: Tensor, previous: Previous | None
    ) -> tuple[Tensor, Tensor]:
        if previous is None:
            positions = m.new_zeros(*features["aatype"].shape, 37, 3)
            previous = Previous(torch.zeros_like(m[..., 0, :, :]), torch.zeros_like(z), positions)
        row, pair = self.recycling_embedder(
            features["aatype"].long(),
            previous.first_row.to(m.dtype),
            previous.pair.to(z.dtype),
            previous.positions,
        )
        first = m[..., :1, :, :] + row.unsqueeze(-3)
        return torch.cat((first, m[..., 1:, :, :]), -3), z + pair

    def _chunks(self) -> int | None:
        return None if torch.is_grad_enabled() else self.chunk_size


def _cycles(features: Features | Sequence[Features], num_recycles: int | None) -> list[Features]:
    """The features of each iteration."""
    if num_recycles is not None and num_recycles < 0:
        raise FoldInputError(f"num_recycles is at least 0, found {num_recycles}")
    if isinstance(features, Mapping):
        return [features] * ((num_recycles or 0) + 1)
    if not features or (num_recycles is not None and len(features) != num_recycles + 1):
        raise FoldInputError(
            f"there are {len(features)} mappings of features; {num_recycles or 0} recycles take "
            f"{(num_recycles or 0) + 1}"
        )
    return list(features)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
