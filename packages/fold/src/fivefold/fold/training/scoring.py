"""The lDDT of predictions of whole chains, over all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data.dataset import Chains
from fivefold.fold.data.features import Draw, prediction_features
from fivefold.fold.errors import FoldDataError
from fivefold.fold.metrics import lddt_ca
from fivefold.fold.model.alphafold import AlphaFold


def placed(
    features: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Features where the network is, floats as its structure module has them."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in features.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a rank found.

    Attributes:
        sums: by name, to be summed over the ranks: ``scores`` (number of chains) with zeros where
            another rank scored or none could, and ``scored`` with ones where one did.
        problems: of chains that could not be scored.
    """

    sums: dict[str, Tensor]
    problems: list[str]


@torch.no_grad()
def score_chains(
    model: AlphaFold,
    chains: Chains,
    config: FeatureConfig,
    num_recycles: int,
    *,
    rank: int = 0,
    size: int = 1,
) -> Scored:
    """Predict every ``size``-th chain, beginning with number ``rank``, and score it.

    The same chain gets the same features in every evaluation.
    """
    like = next(model.structure_module.parameters())
    device = like.device
    scores = torch.zeros(len(chains), dtype=torch.float64, device=device)
    scored = torch.zeros_like(scores)
    problems = []
    for number in range(rank, len(chains), size):
        try:
            example = chains[number]
        except FoldDataError as error:
            problems.append(str(error))
            continue
        cycles = prediction_features(example, config, Draw(sample=number), num_recycles)
        cycles = [placed(each, device, like.dtype) for each in cycles]
        found = model(cycles)["structure_module"]["final_atom_positions"]
        truth = cycles[-1]
        lddt = lddt_ca(found, truth["all_atom_positions"], truth["all_atom_mask"])
        if torch.isnan(lddt):
            problems.append(f"{example.name} has no two alpha carbons near each other")
        else:
            scores[number], scored[number] = lddt, 1
    return Scored({"scores": scores, "scored": scored}, problems)
