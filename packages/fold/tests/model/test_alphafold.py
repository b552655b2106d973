"""The whole network against AlphaFold's JAX code: iterations, losses and gradients."""

from typing import Any

import fold_inputs as inputs
import numpy as np
import pytest
import torch
from fold_network import cycle_features
from torch import Tensor

from fivefold.fold.config import LossConfig
from fivefold.fold.losses import alphafold_loss
from fivefold.fold.losses.fape import backbone_fape, rename, side_chain_fape
from fivefold.fold.losses.torsions import torsion_losses
from fivefold.fold.losses.violations import find_violations, violated_residues
from fivefold.fold.model.alphafold import AlphaFold, Previous
from fivefold.fold.params.convert import to_alphafold
from fivefold.fold.params.names import table

LOSS = LossConfig(violation=1.0, experimentally_resolved=0.01, aligned_error=0.1)
Structure = dict[str, Tensor]
Goldens = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cycles(oracle_model: AlphaFold, structure: Structure) -> list[dict[str, Any]]:
    """Outputs of four iterations, each after the other."""
    found, previous = [], None
    with torch.no_grad():
        for cycle in range(4):
            outputs = oracle_model.iteration(cycle_features(structure, cycle), previous)
            previous = Previous.of(outputs)
            found.append(outputs)
    return found


def relative(found: Tensor, golden: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    ours = inputs.sample(found.detach().numpy())
    return float(np.abs(ours - golden.reshape(-1)).max() / np.abs(golden).max())


@pytest.mark.parametrize("cycle", range(4))
def test_representations_and_logits_are_alphafolds(
    cycles: list[dict[str, Any]], goldens: Goldens, cycle: int
) -> None:
    outputs = cycles[cycle]
    for name in ("msa", "pair", "single", "msa_first_row", "structure_module"):
        golden = goldens[f"cycle{cycle}.representations.{name}"]
        assert relative(outputs["representations"][name], golden) < 1e-5, name
    heads = ("masked_msa", "distogram", "predicted_lddt", "experimentally_resolved")
    for name in (*heads, "predicted_aligned_error"):
        assert relative(outputs[name]["logits"], goldens[f"cycle{cycle}.{name}.logits"]) < 1e-5


@pytest.mark.parametrize("cycle", range(4))
def test_positions_are_alphafolds(
    cycles: list[dict[str, Any]], goldens: Goldens, cycle: int
) -> None:
    found, golden = cycles[cycle]["structure_module"], f"cycle{cycle}."
    atoms = goldens[golden + "final_atom_positions"]
    assert np.abs(found["final_atom_positions"].numpy() - atoms).max() < 1e-3
    assert np.abs(atoms).max() > 10
    affines = goldens[golden + "final_affines"]
    assert np.abs(found["final_affines"].numpy() - affines).max() < 1e-3
    assert np.abs(inputs.sample(found["traj"].numpy()) - goldens[golden + "traj"]).max() < 1e-3
    angles = inputs.sample(found["sidechains"]["angles_sin_cos"].numpy())
    assert np.abs(angles - goldens[golden + "angles_sin_cos"]).max() < 1e-4


@pytest.mark.parametrize("cycle", range(4))
def test_every_loss_is_alphafolds(
    cycles: list[dict[str, Any]], structure: Structure, goldens: Goldens, cycle: int
) -> None:
    batch, outputs = cycle_features(structure, cycle), cycles[cycle]
    total, terms = alphafold_loss(outputs, batch, LOSS)
    found = outputs["structure_module"]
    renamed = rename(batch, found["final_atom14_positions"])
    chi, norm = torsion_losses(found, batch)
    ours = {
        "masked_msa.loss": terms["masked_msa"],
        "distogram.loss": terms["distogram"],
        "predicted_lddt.loss": terms["plddt"],
        "experimentally_resolved.loss": terms["experimentally_resolved"],
        "predicted_aligned_error.loss": terms["aligned_error"],
        "structure_module.chi_loss": chi,
        "structure_module.angle_norm_loss": norm,
        "structure_module.fape": backbone_fape(found, batch, LOSS)[-1],
        "structure_module.sidechain_fape": side_chain_fape(found, batch, renamed, LOSS),
        "total": total,
    }
    for name, value in ours.items():
        golden = goldens[f"cycle{cycle}.loss.{name}"]
        assert abs(float(value) - golden) <= 1e-5 * abs(golden), name


@pytest.mark.parametrize("cycle", [0, 3])
def test_violations_are_alphafolds(
    cycles: list[dict[str, Any]], structure: Structure, goldens: Goldens, cycle: int
) -> None:
    batch = cycle_features(structure, cycle)
    atoms = cycles[cycle]["structure_module"]["final_atom14_positions"]
    bonds, between, within = find_violations(atoms, batch, LOSS)
    ours = {
        "bonds_c_n_loss_mean": bonds.c_n,
        "angles_ca_c_n_loss_mean": bonds.ca_c_n,
        "angles_c_n_ca_loss_mean": bonds.c_n_ca,
        "connections_per_residue_violation_mask": bonds.violated,
        "clashes_per_atom_loss_sum": between.loss,
        "clashes_per_atom_clash_mask": between.violated,
        "within_per_atom_loss_sum": within.loss,
        "within_per_atom_violations": within.violated,
        "total_per_residue_violations_mask": violated_residues(atoms, batch, LOSS),
    }
    for name, value in ours.items():
        golden = goldens[f"cycle{cycle}.loss.violations.{name}"]
        off = np.abs(value.numpy() - golden).max()
        assert off <= 1e-4 + 1e-5 * np.abs(golden).max(), name


def test_gradients_are_alphafolds(
    oracle_model: AlphaFold, cycles: list[dict[str, Any]], structure: Structure, goldens: Goldens
) -> None:
    batch = cycle_features(structure, 1)
    outputs = oracle_model.iteration(batch, Previous.of(cycles[0]))
    total, _ = alphafold_loss(outputs, batch, LOSS)
    named = dict(oracle_model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()))
    gradients = to_alphafold(dict(zip(named, found, strict=True)), table(oracle_model.config))
    names = [name.removeprefix("gradient.") for name in goldens if name.startswith("gradient.")]
    assert len(names) >= 20
    for name in names:
        golden = goldens[f"gradient.{name}"]
        off = np.abs(inputs.sample(gradients[name]) - golden).max()
        assert off <= 5e-4 * np.abs(golden).max(), name
        assert np.abs(golden).max() > 0, name
