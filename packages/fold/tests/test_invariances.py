"""What must change nothing, and what must: rotations, padding, names of atoms, mirrors, lengths."""

from typing import Any

import pytest
import torch
from fold_network import cycle_features
from torch import Tensor

from fivefold.fold import AlphaFold, LossConfig, alphafold_loss
from fivefold.fold.errors import FoldInputError
from fivefold.fold.geometry.atoms import atom14_to_atom37, pseudo_beta
from fivefold.fold.geometry.ground_truth import supervised_features
from fivefold.fold.geometry.rigid import Rigid, quaternion_to_rotation
from fivefold.fold.losses.fape import frame_aligned_point_error, rename
from fivefold.fold.model.features import check

LOSS = LossConfig(violation=1.0, experimentally_resolved=0.01, aligned_error=0.1)
OF_SEQUENCES = ("msa_feat", "msa_mask", "true_msa", "bert_mask")
OF_EXTRA = ("extra_msa", "extra_has_deletion", "extra_deletion_value", "extra_msa_mask")


def labelled(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features with labels of our own making."""
    made = supervised_features(
        features["aatype"], features["all_atom_positions"], features["all_atom_mask"]
    )
    return features | made


def first(features: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first residues of a chain."""
    pairs = {name: x for name, x in features.items() if not name.startswith("template_")}
    cut = {}
    for name, x in pairs.items():
        dim = 1 if name in OF_SEQUENCES + OF_EXTRA else 0
        cut[name] = x.narrow(dim, 0, count) if x.dim() > dim else x
    for name, x in features.items():
        if name.startswith("template_"):
            cut[name] = x.narrow(1, 0, count) if x.dim() > 1 else x
    return cut


def padded(features: dict[str, Tensor], residues: int, rows: int) -> dict[str, Tensor]:
    """The features with residues, sequences and templates that are not there."""
    made = {}
    for name, x in features.items():
        by_row = name in OF_SEQUENCES + OF_EXTRA or name.startswith("template_")
        dim = 1 if by_row else 0
        if x.dim() > dim:
            x = _grown(x, dim, residues)
        if by_row:
            x = _grown(x, 0, rows)
        made[name] = x
    return made


def _grown(x: Tensor, dim: int, count: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = count
    return torch.cat((x, x.new_zeros(shape)), dim)


def moved(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The true structure turned and shifted."""
    torch.manual_seed(0)
    turn = torch.randn(4)
    frame = Rigid(quaternion_to_rotation(turn / turn.norm()), 30 * torch.randn(3))
    atoms = frame.apply(features["all_atom_positions"]) * features["all_atom_mask"].unsqueeze(-1)
    return labelled(features | {"all_atom_positions": atoms})


def run(model: AlphaFold, features: dict[str, Tensor], num_recycles: int = 1) -> dict[str, Any]:
    with torch.no_grad():
        return model(features, num_recycles=num_recycles)


def test_losses_do_not_know_where_the_truth_lies(
    tiny_model: AlphaFold, features: dict[str, Tensor]
) -> None:
    outputs = run(tiny_model, features)
    _, terms = alphafold_loss(outputs, labelled(features), LOSS)
    _, other = alphafold_loss(outputs, moved(features), LOSS)
    assert terms.keys() == other.keys() and len(terms) == 10
    for name, value in terms.items():
        assert torch.allclose(value, other[name], rtol=1e-4, atol=1e-5), name


def test_a_mirror_image_is_an_error(features: dict[str, Tensor]) -> None:
    batch = labelled(features)
    frames = Rigid.from_affine(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]
    mirror = features["all_atom_positions"] * torch.tensor([1.0, 1.0, -1.0])
    other = Rigid.from_affine(
        labelled(features | {"all_atom_positions": mirror})["backbone_affine_tensor"]
    )

    def error(one: Rigid, two: Rigid) -> float:
        points = (one.translation, two.translation, mask)
        return float(frame_aligned_point_error(one, two, mask, *points, 10.0, None))

    # The root of the constant that keeps the square root smooth.
    assert error(frames, frames) == pytest.approx(1e-3, rel=0.05)
    assert error(frames, other) > 0.3


@pytest.mark.parametrize(("residues", "rows"), [(1, 0), (5, 3)])
def test_padding_changes_nothing(
    tiny_model: AlphaFold, features: dict[str, Tensor], residues: int, rows: int
) -> None:
    batch = labelled(features)
    more = padded(batch, residues, rows)
    one, two = run(tiny_model, batch), run(tiny_model, more)
    n, s = features["aatype"].shape[0], features["msa_feat"].shape[0]
    atoms = two["structure_module"]["final_atom_positions"][:n]
    assert torch.allclose(atoms, one["structure_module"]["final_atom_positions"], atol=1e-4)
    for name in ("pair", "single", "msa"):
        found = two["representations"][name]
        found = found[:s, :n] if name == "msa" else found[:n, :n] if name == "pair" else found[:n]
        expected = one["representations"][name]
        seen = features["msa_mask"].unsqueeze(-1) if name == "msa" else torch.ones(())
        assert float(((found - expected) * seen).abs().max()) < 2e-6 * float(expected.abs().max())
    _, terms = alphafold_loss(one, batch, LOSS)
    _, others = alphafold_loss(two, more, LOSS)
    for name, value in terms.items():
        assert torch.allclose(value, others[name], rtol=1e-4), name


def test_a_batch_is_its_samples(tiny_model: AlphaFold, structure: dict[str, Tensor]) -> None:
    samples = [labelled(cycle_features(structure, cycle)) for cycle in (0, 1)]
    batch = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}
    outputs = run(tiny_model, batch)
    loss, _ = alphafold_loss(outputs, batch, LOSS)
    assert loss.shape == (2,)
    for number, sample in enumerate(samples):
        single = run(tiny_model, sample)
        atoms = outputs["structure_module"]["final_atom_positions"][number]
        assert torch.allclose(atoms, single["structure_module"]["final_atom_positions"], atol=1e-4)
        assert torch.allclose(loss[number], alphafold_loss(single, sample, LOSS)[0], rtol=1e-4)


def test_names_of_ambiguous_atoms_do_not_matter(
    tiny_model: AlphaFold, features: dict[str, Tensor]
) -> None:
    # Both atoms of a pair are known or neither: no name of one that is not there.
    known = labelled(features)
    both = torch.minimum(known["atom14_gt_exists"], known["atom14_alt_gt_exists"])
    mask = atom14_to_atom37(features["aatype"], both.unsqueeze(-1)).squeeze(-1)
    batch = labelled(features | {"all_atom_mask": mask})
    outputs = run(tiny_model, batch)
    ambiguous = (batch["atom14_atom_is_ambiguous"] * batch["atom14_gt_exists"]).amax(-1)
    assert float(ambiguous.sum()) >= 2
    swapped = dict(batch)
    for one, other in (
        ("atom14_gt_positions", "atom14_alt_gt_positions"),
        ("atom14_gt_exists", "atom14_alt_gt_exists"),
        ("rigidgroups_gt_frames", "rigidgroups_alt_gt_frames"),
    ):
        swapped[one], swapped[other] = batch[other], batch[one]
    atoms = outputs["structure_module"]["final_atom14_positions"]
    better = rename(batch, atoms)["alt_naming_is_better"]
    assert torch.equal(rename(swapped, atoms)["alt_naming_is_better"] * ambiguous,
                       (1 - better) * ambiguous)  # fmt: skip
    _, terms = alphafold_loss(outputs, batch, LOSS)
    _, others = alphafold_loss(outputs, swapped, LOSS)
    assert torch.allclose(terms["side_chain"], others["side_chain"], rtol=1e-6)


def test_glycine_has_its_alpha_carbon_for_a_beta() -> None:
    atoms = torch.arange(2 * 37 * 3.0).reshape(2, 37, 3)
    beta = pseudo_beta(torch.tensor([7, 0]), atoms)
    assert torch.equal(beta, torch.stack((atoms[0, 1], atoms[1, 3])))


@pytest.mark.parametrize("length", [1, 2, 13])
def test_any_length(tiny_model: AlphaFold, features: dict[str, Tensor], length: int) -> None:
    batch = labelled(first(features, length))
    outputs = tiny_model(batch, num_recycles=1)
    assert outputs["structure_module"]["final_atom_positions"].shape == (length, 37, 3)
    loss, _ = alphafold_loss(outputs, batch, LOSS)
    loss.backward()
    found = [p.grad for p in tiny_model.parameters() if p.grad is not None]
    tiny_model.zero_grad(set_to_none=True)
    assert torch.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in found)


def test_chunks_and_chains(tiny_model: AlphaFold, features: dict[str, Tensor]) -> None:
    whole = run(tiny_model, features)["representations"]["pair"]
    tiny_model.chunk_size = 3
    parts = run(tiny_model, features)["representations"]["pair"]
    tiny_model.chunk_size = None
    assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-5)
    chains = torch.zeros(16, dtype=torch.long)
    one_chain = run(tiny_model, features | {"asym_id": chains})["representations"]["pair"]
    assert torch.equal(one_chain, whole)
    chains[8:] = 1
    assert not torch.allclose(
        run(tiny_model, features | {"asym_id": chains})["representations"]["pair"], whole
    )


def test_features_that_do_not_fit_are_named(
    tiny_model: AlphaFold, features: dict[str, Tensor]
) -> None:
    with pytest.raises(
        FoldInputError, match="features lack template_mask; this network needs aatype"
    ):
        check({k: v for k, v in features.items() if k != "template_mask"}, True)
    with pytest.raises(FoldInputError, match=r"msa_mask has shape \(16,\); of aatype \(16,\)"):
        check(features | {"msa_mask": torch.ones(16)}, True)
    with pytest.raises(FoldInputError, match="aatype 16 residues"):
        check(features | {"msa_mask": torch.ones(8, 15)}, True)
    with pytest.raises(FoldInputError, match="at least 0, found -1"):
        tiny_model(features, num_recycles=-1)
    with pytest.raises(FoldInputError, match="2 mappings of features; 3 recycles take 4"):
        tiny_model([features, features], num_recycles=3)
