"""Features of 2Q2K: shapes, crops, what is random and what is not; the network takes them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fivefold.fold.config import FeatureConfig
from fivefold.fold.data.alignments import join, query_only, read_alignment
from fivefold.fold.data.features import (
    Draw,
    Example,
    Templates,
    collate,
    prediction_features,
    training_features,
)
from fivefold.fold.data.structures import read_structure
from fivefold.fold.errors import FoldDataError
from fivefold.fold.model import features as names
from fivefold.fold.model.alphafold import AlphaFold

CONFIG = FeatureConfig(crop_size=32, max_msa_clusters=9, max_extra_msa=12, max_templates=2)


@pytest.fixture(scope="module")
def example(real: Path) -> Example:
    structure = read_structure(real / "structures/2q2k.cif.gz")
    files = ("uniref90_hits.sto", "bfd_uniclust_hits.a3m")
    parts = [read_alignment(real / f"alignments/2q2k_A/{name}.gz") for name in files]
    chain = structure.chain("A")
    return Example(
        name="2q2k_A",
        sequence=chain.sequence,
        alignment=join(parts),
        chain=chain,
        resolution=structure.resolution,
        templates=Templates(
            aatype=torch.from_numpy(chain.aatype).expand(3, -1),
            positions=torch.from_numpy(chain.positions).expand(3, -1, -1, -1),
            mask=torch.from_numpy(chain.mask).expand(3, -1, -1),
        ),
    )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_training_features_have_a_fixed_size(example: Example) -> None:
    (found,) = training_features(example, CONFIG, Draw())
    names.check(found, with_templates=True)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes["msa_feat"] == (7, 32, 49)
    assert shapes["extra_msa"] == shapes["extra_msa_mask"] == (12, 32)
    assert shapes["template_all_atom_positions"] == (2, 32, 37, 3)
    assert shapes["atom14_gt_positions"] == (32, 14, 3)
    assert found["msa_mask"].sum() > 0 and found["resolution"] == 3.0
    assert all(torch.isfinite(x).all() for x in found.values() if x.is_floating_point())


def test_a_crop_is_a_window_of_everything(example: Example) -> None:
    (found,) = training_features(example, CONFIG, Draw(sample=5))
    start = int(found["residue_index"][0])
    window = slice(start, start + 32)
    assert found["residue_index"].tolist() == list(range(start, start + 32))
    assert example.chain is not None
    assert found["aatype"].tolist() == example.chain.aatype[window].tolist()
    assert torch.equal(found["all_atom_mask"], torch.from_numpy(example.chain.mask[window]))
    assert found["true_msa"][0].tolist() == example.alignment.classes[0, window].tolist()
    assert torch.equal(found["target_feat"][:, 1:].argmax(-1), found["aatype"])
    starts = {
        int(training_features(example, CONFIG, Draw(sample=i))[0]["residue_index"][0])
        for i in range(60)
    }
    assert min(starts) < 5 and max(starts) > 33 and max(starts) <= 70 - 32


def test_draws_follow_from_seed_epoch_and_sample(example: Example) -> None:
    draw = Draw(seed=1, epoch=2, sample=3)
    (first,) = training_features(example, CONFIG, draw)
    (again,) = training_features(example, CONFIG, draw)
    assert equal(first, again)
    for other in (replace(draw, seed=2), replace(draw, epoch=3), replace(draw, sample=4)):
        assert not equal(first, training_features(example, CONFIG, other)[0])


def test_iterations_differ_in_the_msa_alone(example: Example) -> None:
    differ: set[str] = set()
    for i in range(5):
        few = replace(CONFIG, max_msa_clusters=4)  # so that others are left over
        one, two = training_features(example, few, Draw(sample=i), num_recycles=1)
        differ |= {name for name in one if not torch.equal(one[name], two[name])}
    assert "msa_feat" in differ and "extra_msa" in differ
    assert differ <= {
        *("msa_feat", "msa_mask", "true_msa", "bert_mask", "extra_msa", "extra_msa_mask"),
        *("extra_has_deletion", "extra_deletion_value"),
    }


def test_fape_is_clamped_in_nine_of_ten(example: Example) -> None:
    clamped = [
        training_features(example, CONFIG, Draw(sample=i))[0]["use_clamped_fape"].item()
        for i in range(100)
    ]
    assert 0.8 < sum(clamped) / 100 < 0.98


def test_templates_from_none_to_all(example: Example) -> None:
    counts = {
        int(training_features(example, CONFIG, Draw(sample=i))[0]["template_mask"].sum())
        for i in range(40)
    }
    assert counts == {0, 1, 2}
    without = replace(example, templates=None)
    (found,) = training_features(without, CONFIG, Draw())
    assert found["template_mask"].tolist() == [0, 0]
    assert (found["template_aatype"] == 21).all()
    (found,) = training_features(example, replace(CONFIG, max_templates=0), Draw())
    assert "template_mask" not in found and found["msa_feat"].shape[0] == 9


def test_short_chains_are_padded(example: Example) -> None:
    (found,) = training_features(example, replace(CONFIG, crop_size=80), Draw())
    assert found["seq_mask"].tolist() == [1] * 70 + [0] * 10
    for name in ("all_atom_mask", "target_feat", "backbone_affine_mask"):
        assert not found[name][70:].any()
    for name in ("msa_mask", "bert_mask", "extra_msa_mask"):
        assert not found[name][:, 70:].any()
    assert found["extra_msa_mask"][:, 0].sum() <= 12


def test_prediction_takes_all_of_the_chain(example: Example) -> None:
    found = prediction_features(example, CONFIG, num_recycles=2)
    assert len(found) == 3
    assert found[0]["aatype"].shape == (70,)
    assert found[0]["template_mask"].tolist() == [1, 1]
    assert found[0]["msa_mask"].all() and found[0]["extra_msa_mask"].all()
    alone = Example(name="x", sequence="ACDEF", alignment=query_only("ACDEF"))
    (found,) = prediction_features(alone, CONFIG)
    assert found["msa_feat"].shape == (1, 5, 49)
    assert found["extra_msa_mask"].tolist() == [[0] * 5]
    assert "all_atom_positions" not in found


def test_the_network_takes_a_batch_of_them(example: Example, tiny_model: AlphaFold) -> None:
    samples = [training_features(example, CONFIG, Draw(sample=i), num_recycles=1) for i in (0, 1)]
    batch = collate(samples)
    assert len(batch) == 2 and batch[0]["aatype"].shape == (2, 32)
    with torch.no_grad():
        together = tiny_model(batch)["structure_module"]["final_atom_positions"]
        alone = tiny_model(samples[1])["structure_module"]["final_atom_positions"]
    assert together.shape == (2, 32, 37, 3)
    torch.testing.assert_close(together[1], alone, atol=1e-3, rtol=0)


def test_what_does_not_fit_is_named(example: Example) -> None:
    with pytest.raises(FoldDataError, match="2q2k_A: the alignment is of 'ACD'"):
        replace(example, alignment=query_only("ACD"))
    with pytest.raises(FoldDataError, match="2q2k_A has no structure"):
        training_features(replace(example, chain=None), CONFIG, Draw())
    samples = [training_features(example, CONFIG, Draw(), num_recycles=n) for n in (0, 1)]
    with pytest.raises(FoldDataError, match=r"\[1, 2\] iterations"):
        collate(samples)
