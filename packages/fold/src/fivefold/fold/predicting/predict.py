"""From what is known of a chain to its structure and how sure the network is of it.

Legend: N residues, B bins.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data.features import Draw, Example, prediction_features
from fivefold.fold.geometry.tables import tables
from fivefold.fold.model.alphafold import AlphaFold


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A structure, on the CPU.

    Attributes:
        name: of the chain.
        sequence: of it.
        positions: of the 37 kinds of atoms (N, 37, 3), in angstrom.
        atom_mask: (N, 37) 1 for the atoms that the residues have.
        plddt: expected lDDT of each residue (N,), from 0 to 100.
        aligned_error: expected error (N, N) in angstrom of the second residue where the first is
            put in place; None without that head.
        max_aligned_error: the largest that it can say, in angstrom.
        ptm: expected TM-score; None without that head.
    """

    name: str
    sequence: str
    positions: Tensor
    atom_mask: Tensor
    plddt: Tensor
    aligned_error: Tensor | None = None
    max_aligned_error: float | None = None
    ptm: float | None = None

    @property
    def mean_plddt(self) -> float:
        """Of all residues."""
        return float(self.plddt.mean())


@torch.no_grad()
def predict(
    model: AlphaFold,
    example: Example,
    config: FeatureConfig,
    *,
    num_recycles: int | None = None,
    seed: int = 0,
) -> Prediction:
    """Predict one chain, whole.

    Args:
        model: in eval mode, wherever it is; ``chunk_size`` bounds its memory.
        example: sequence, alignment and perhaps templates; a structure is not looked at.
        config: sizes of the MSA.
        num_recycles: iterations before the last; None is the configuration's.
        seed: of the rows of the MSA that are drawn, and of what is masked.
    """
    cycles = config.num_recycles if num_recycles is None else num_recycles
    device = next(model.structure_module.parameters()).device
    features = prediction_features(example, config, Draw(seed=seed), cycles)
    outputs = model([{n: x.to(device) for n, x in each.items()} for each in features])
    aatype = features[-1]["aatype"]
    positions = outputs["structure_module"]["final_atom_positions"].float().cpu()
    found = Prediction(
        name=example.name,
        sequence=example.sequence,
        positions=positions,
        atom_mask=tables(torch.device("cpu"), torch.float32).atom37_exists[aatype],
        plddt=plddt(outputs["predicted_lddt"]["logits"].cpu()),
    )
    error = outputs.get("predicted_aligned_error")
    return found if error is None else _sure(found, error["logits"].cpu(), error["breaks"].cpu())


def plddt(logits: Tensor) -> Tensor:
    """Expected lDDT (N,) from 0 to 100, of logits (N, B) of bins of equal width."""
    num_bins = logits.shape[-1]
    centers = (torch.arange(num_bins, dtype=torch.float32) + 0.5) * (100 / num_bins)
    return (logits.float().softmax(-1) * centers).sum(-1)


def error_centers(breaks: Tensor) -> Tensor:
    """Middles (B,) of the bins of errors between breaks (B - 1,); the last is open."""
    step = breaks[1] - breaks[0]
    return torch.cat((breaks + step / 2, (breaks[-1] + 1.5 * step).unsqueeze(0)))


def predicted_tm(logits: Tensor, breaks: Tensor) -> Tensor:
    """Expected TM-score (supplement, equation 40) of logits (N, N, B) of aligned errors."""
    # Of short chains AlphaFold takes the scale of 19 residues, which no score of structures does.
    scale = 1.24 * (max(logits.shape[-2], 19) - 15) ** (1 / 3) - 1.8
    per_bin = 1 / (1 + (error_centers(breaks) / scale).square())
    return (logits.float().softmax(-1) * per_bin).sum(-1).mean(-1).max()


def _sure(prediction: Prediction, logits: Tensor, breaks: Tensor) -> Prediction:
    """The prediction with what its aligned errors say."""
    centers = error_centers(breaks)
    return replace(
        prediction,
        aligned_error=(logits.float().softmax(-1) * centers).sum(-1),
        max_aligned_error=float(centers[-1]),
        ptm=float(predicted_tm(logits, breaks)),
    )
