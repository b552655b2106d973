"""The weighted sum of all losses (supplement, equation 7)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fivefold.fold.config import LossConfig
from fivefold.fold.errors import FoldInputError
from fivefold.fold.losses.fape import backbone_fape, rename, side_chain_fape
from fivefold.fold.losses.heads import (
    aligned_error_loss,
    distogram_loss,
    experimentally_resolved_loss,
    masked_msa_loss,
    plddt_loss,
)
from fivefold.fold.losses.parts import Batch
from fivefold.fold.losses.torsions import torsion_losses
from fivefold.fold.losses.violations import violation_loss


def alphafold_loss(
    outputs: Mapping[str, Any], batch: Batch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (...) of each sample and its unweighted terms, those of weight 0 left out.

    Nothing is scaled by the length of the sample; AlphaFold's training multiplies the result by
    the square root of the number of residues, which is the caller's to do.

    Args:
        outputs: of the network.
        batch: features for losses, see ``model.features``.
        config: weights and constants.

    Raises:
        FoldInputError: a loss is asked for whose head the network has not.
    """
    terms = _terms(outputs, batch, config)
    total = sum((getattr(config, name) * value for name, value in terms.items()), start=0)
    if not isinstance(total, Tensor):
        raise FoldInputError("all weights of the loss are 0; at least one is not")
    return total, terms


def _terms(outputs: Mapping[str, Any], batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    structure = outputs["structure_module"]
    if config.aligned_error and "predicted_aligned_error" not in outputs:
        raise FoldInputError(
            f"aligned_error has the weight {config.aligned_error}, but this network has no such "
            "head; set heads.aligned_error, or the weight to 0"
        )
    terms = _structure_terms(structure, batch, config)
    if config.distogram:
        terms["distogram"] = distogram_loss(outputs["distogram"], batch)
    if config.masked_msa:
        terms["masked_msa"] = masked_msa_loss(outputs["masked_msa"], batch)
    if config.plddt:
        terms["plddt"] = plddt_loss(outputs["predicted_lddt"], structure, batch, config)
    if config.experimentally_resolved:
        head = outputs["experimentally_resolved"]
        terms["experimentally_resolved"] = experimentally_resolved_loss(head, batch, config)
    if config.aligned_error:
        head = outputs["predicted_aligned_error"]
        terms["aligned_error"] = aligned_error_loss(head, structure, batch, config)
    return terms


def _structure_terms(
    structure: Mapping[str, Any], batch: Batch, config: LossConfig
) -> dict[str, Tensor]:
    terms = {}
    if config.backbone:
        terms["backbone"] = backbone_fape(structure, batch, config).mean(0)
    if config.side_chain:
        renamed = rename(batch, structure["final_atom14_positions"])
        terms["side_chain"] = side_chain_fape(structure, batch, renamed, config)
    chi, norm = torsion_losses(structure, batch)
    terms |= {"chi": chi} if config.chi else {}
    terms |= {"torsion_norm": norm} if config.torsion_norm else {}
    if config.violation:
        atom14 = structure["final_atom14_positions"]
        terms["violation"] = violation_loss(atom14, batch, config)
    return terms
