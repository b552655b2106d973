"""The network of the goldens on our side: its configuration, parameters and features."""

from dataclasses import replace

import fold_inputs as inputs
import numpy as np
import torch
from torch import Tensor

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.params.names import parts_of, table
from fivefold.fold.presets import preset


def oracle_config() -> AlphaFoldConfig:
    """The network that the goldens were made with."""
    model = preset("model_1_ptm").model
    return replace(
        model,
        evoformer=replace(model.evoformer, num_blocks=2),
        extra_msa=replace(model.extra_msa, num_blocks=1),
    )


def tiny_config(**changes: object) -> AlphaFoldConfig:
    """The narrowest network that has everything."""
    model = preset("small").model
    stack = replace(model.evoformer, num_blocks=1, num_msa_heads=2, msa_head_width=4,
                    num_pair_heads=2, pair_head_width=4, c_outer=4, c_triangle=8)  # fmt: skip
    template = replace(model.template, c_pair=8, stack=stack, num_heads=2, head_width=4)
    structure = replace(model.structure, num_layers=2, num_heads=2, head_width=4,
                        num_query_points=2, num_value_points=3, c_torsion=8)  # fmt: skip
    heads = replace(model.heads, c_lddt=8, aligned_error=True)
    widths = {"c_m": 16, "c_z": 8, "c_s": 12, "c_e": 8}
    made = replace(model, **widths, evoformer=stack, extra_msa=stack, template=template,
                   structure=structure, heads=heads)  # fmt: skip
    return replace(made, **changes)


def alphafold_arrays(config: AlphaFoldConfig) -> dict[str, np.ndarray]:
    """AlphaFold's arrays for a network, from seeds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts_of(table(config)):
        lead = () if part.block is None else (part.block + 1,)
        shapes[part.alphafold] = lead + part.shape
    return {name: inputs.parameter(name, shape) for name, shape in shapes.items()}


def cycle_features(structure: dict[str, Tensor], cycle: int) -> dict[str, Tensor]:
    """The features of one iteration of the goldens."""
    made = {name: torch.from_numpy(np.asarray(x)) for name, x in inputs.msa_features(cycle).items()}
    return structure | made
