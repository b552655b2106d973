"""Every layer on its own against AlphaFold's JAX code."""

import fold_inputs as inputs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fivefold.fold.geometry.rigid import Rigid
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.model.blocks import Masks

N, S, E = inputs.NUM_RESIDUES, inputs.NUM_CLUSTERS, inputs.NUM_EXTRA


def values(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(inputs.values(name, *shape))


def mask(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(inputs.mask(name, *shape))


M, Z, X = values("m", S, N, 256), values("z", N, N, 128), values("e", E, N, 64)
M_MASK, Z_MASK, X_MASK = mask("m_mask", S, N), mask("z_mask", N, N), mask("e_mask", E, N)
M_KEYS, Z_KEYS = M_MASK > 0, Z_MASK > 0
CASES = {
    "msa_row_attention": ("evoformer.blocks.0.msa_row_attention", (M, Z, M_KEYS)),
    "msa_column_attention": ("evoformer.blocks.0.msa_column_attention", (M, M_KEYS)),
    "msa_column_global_attention": ("extra_msa_stack.blocks.0.msa_column_attention", (X, X_MASK)),
    "msa_transition": ("evoformer.blocks.0.msa_transition", (M,)),
    "outer_product_mean": ("evoformer.blocks.0.outer_product_mean", (M, M_MASK)),
    "pair_transition": ("evoformer.blocks.0.pair.pair_transition", (Z,)),
    "triangle_multiplication_outgoing": (
        "evoformer.blocks.0.pair.triangle_multiplication_outgoing",
        (Z, Z_MASK),
    ),
    "triangle_multiplication_incoming": (
        "evoformer.blocks.0.pair.triangle_multiplication_incoming",
        (Z, Z_MASK),
    ),
    "triangle_attention_starting_node": (
        "evoformer.blocks.0.pair.triangle_attention_starting",
        (Z, Z_KEYS),
    ),
    "triangle_attention_ending_node": (
        "evoformer.blocks.0.pair.triangle_attention_ending",
        (Z, Z_KEYS),
    ),
}


def near(found: Tensor, golden: np.ndarray) -> bool:
    off = np.abs(inputs.sample(found.detach().numpy()) - golden)
    return bool(off.max() <= 1e-5 * max(1.0, np.abs(golden).max()))


def layer(model: AlphaFold, name: str) -> nn.Module:
    return model.get_submodule(name)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_alphafolds(
    oracle_model: AlphaFold, goldens: dict[str, np.ndarray], name: str
) -> None:
    path, arguments = CASES[name]
    found = layer(oracle_model, path)(*arguments)
    assert near(found, goldens[f"layers.{name}.out"])


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("name", CASES)
def test_chunks_change_nothing(oracle_model: AlphaFold, name: str, size: int) -> None:
    path, arguments = CASES[name]
    with torch.no_grad():
        whole = layer(oracle_model, path)(*arguments)
        parts = layer(oracle_model, path)(*arguments, chunk_size=size)
    assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "path", "x", "x_mask"), [
    ("main_block", "evoformer.blocks.0", M, M_MASK),
    ("extra_block", "extra_msa_stack.blocks.0", X, X_MASK),
])  # fmt: skip
def test_blocks_are_alphafolds(
    oracle_model: AlphaFold,
    goldens: dict[str, np.ndarray],
    name: str,
    path: str,
    x: Tensor,
    x_mask: Tensor,
) -> None:
    m, z = layer(oracle_model, path)(x, Z, Masks.of(x_mask, Z_MASK))
    assert near(m, goldens[f"layers.{name}.msa"])
    assert near(z, goldens[f"layers.{name}.pair"])


def test_invariant_point_attention_is_alphafolds(
    oracle_model: AlphaFold, goldens: dict[str, np.ndarray]
) -> None:
    affine = values("affine", N, 7)
    quaternion = affine[:, :4] / affine[:, :4].norm(dim=-1, keepdim=True)
    frames = Rigid.from_affine(torch.cat((quaternion, affine[:, 4:]), -1))
    present = mask("seq_mask", 1, N)[0]
    found = oracle_model.structure_module.ipa(values("s", N, 384), Z, frames, present)
    assert near(found, goldens["layers.ipa.out"])
