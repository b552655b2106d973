"""Scores against biotite's, on the atoms of a real protein, moved, mirrored and with holes."""

import math

import biotite.structure as struc
import numpy as np
import pytest
import torch
from torch import Tensor

from fivefold.fold import metrics
from fivefold.fold.errors import FoldInputError

NUM = 60


@pytest.fixture(scope="module")
def chain() -> Tensor:
    """A compact chain (60, 3): steps of 3.8 angstrom that turn back when they leave a ball."""
    rng = np.random.default_rng(0)
    at = [np.zeros(3)]
    for _ in range(NUM - 1):
        step = rng.standard_normal(3) - 0.12 * at[-1]
        at.append(at[-1] + 3.8 * step / np.linalg.norm(step))
    return torch.from_numpy(np.array(at))


def noised(chain: Tensor, scale: float, seed: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    noise = scale * rng.standard_normal(tuple(chain.shape))
    return (chain + torch.from_numpy(noise)) @ torch.from_numpy(turn) + 7


def atom_array(positions: Tensor, chains: list[str] | None = None) -> struc.AtomArray:
    """As many residues as (N, 3) positions have rows, or (R, P, 3), of that many atoms each."""
    per_residue = positions.shape[1] if positions.dim() == 3 else 1
    flat = positions.reshape(-1, 3).numpy().astype(np.float32)
    atoms = struc.AtomArray(len(flat))
    atoms.coord = flat
    atoms.res_id = np.arange(len(flat)) // per_residue + 1
    atoms.chain_id = np.array(chains or ["A"] * len(flat))
    atoms.atom_name = np.array(["CA"] * len(flat))
    atoms.res_name = np.array(["ALA"] * len(flat))
    return atoms


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0])
def test_lddt_equals_biotite(chain: Tensor, scale: float) -> None:
    predicted, mask = noised(chain, scale), torch.ones(NUM)
    theirs = struc.lddt(atom_array(chain), atom_array(predicted))
    assert metrics.lddt(predicted, chain, mask).item() == pytest.approx(theirs, abs=1e-6)
    each = struc.lddt(atom_array(chain), atom_array(predicted), aggregation="residue")
    ours = metrics.lddt(predicted, chain, mask, per_point=True)
    np.testing.assert_allclose(ours.numpy(), each, atol=1e-6)


def test_lddt_leaves_missing_atoms_out(chain: Tensor) -> None:
    predicted = noised(chain, 1.0)
    mask = (torch.arange(NUM) % 7 != 3).double()
    seen = mask.bool()
    theirs = struc.lddt(atom_array(chain[seen]), atom_array(predicted[seen]))
    lost = torch.where(seen.unsqueeze(-1), chain, torch.tensor(0.0).double())
    assert metrics.lddt(predicted, lost, mask).item() == pytest.approx(theirs, abs=1e-6)
    every = metrics.lddt(predicted, lost, mask, per_point=True)
    assert every[~seen].isnan().all()
    assert not every[seen].isnan().any()


def test_lddt_of_two_chains(chain: Tensor) -> None:
    predicted, mask = noised(chain, 1.0), torch.ones(NUM)
    names = ["A"] * 25 + ["B"] * 35
    number = torch.tensor([0] * 25 + [1] * 35)
    known, guess = atom_array(chain, names), atom_array(predicted, names)
    whole = metrics.lddt(predicted, chain, mask).item()
    assert whole == pytest.approx(struc.lddt(known, guess), abs=1e-6)
    between = metrics.lddt(predicted, chain, mask, chain=number).item()
    theirs = struc.lddt(known, guess, exclude_same_chain=True)
    assert between == pytest.approx(theirs, abs=1e-6)
    assert between != pytest.approx(whole, abs=1e-3)


def test_lddt_of_all_atoms_leaves_own_residue_out(chain: Tensor) -> None:
    rng = np.random.default_rng(3)
    true = chain[:, None] + torch.from_numpy(rng.standard_normal((NUM, 5, 3)))
    predicted = noised(true, 0.8)
    mask = torch.from_numpy((rng.random((NUM, 5)) > 0.2).astype(float))
    kept = mask.flatten().bool().numpy()
    theirs = struc.lddt(atom_array(true)[kept], atom_array(predicted)[kept])
    ours = metrics.lddt_all_atom(predicted, true, mask)
    assert ours.item() == pytest.approx(theirs, abs=1e-6)
    each = struc.lddt(atom_array(true)[kept], atom_array(predicted)[kept], aggregation="residue")
    ours = metrics.lddt_all_atom(predicted, true, mask, per_residue=True)
    np.testing.assert_allclose(ours[mask.sum(-1) > 0].numpy(), each, atol=1e-6)


def test_rows_at_once_change_nothing(chain: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, mask = noised(chain, 1.0), torch.ones(NUM)
    whole = metrics.lddt(predicted, chain, mask, per_point=True)
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 7)
    assert torch.equal(metrics.lddt(predicted, chain, mask, per_point=True), whole)


def test_one_point_and_none_have_no_score(chain: Tensor) -> None:
    one = metrics.lddt(chain[:1], chain[:1], torch.ones(1))
    none = metrics.lddt(chain, chain, torch.zeros(NUM))
    assert one.isnan() and none.isnan()
    assert metrics.rmsd(chain[:1] + 3, chain[:1], torch.ones(1).double()) == pytest.approx(0)
    assert metrics.tm_score(chain[:1], chain[:1], torch.ones(1).double()) == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_superposition_equals_biotite(chain: Tensor, scale: float) -> None:
    predicted = noised(chain, scale)
    mask = (torch.arange(NUM) % 5 != 2).double()
    kept = mask.bool().numpy()
    known, guess = atom_array(chain), atom_array(predicted)
    fitted, transform = struc.superimpose(known[kept], guess[kept])
    theirs = struc.rmsd(known[kept], fitted)
    assert metrics.rmsd(predicted, chain, mask).item() == pytest.approx(theirs, abs=1e-5)
    moved = metrics.superpose(predicted, chain, mask)
    np.testing.assert_allclose(moved.numpy(), transform.apply(guess).coord, atol=1e-4)
    scored = struc.tm_score(known[kept], fitted, np.arange(kept.sum()), np.arange(kept.sum()))
    ours = metrics.tm_score(predicted, chain, mask, search=False)
    assert ours.item() == pytest.approx(scored, abs=1e-5)
    off = np.linalg.norm(fitted.coord - known[kept].coord, axis=-1)
    expected = np.mean([(off < c).mean() for c in (0.5, 1, 2, 4)])
    ours = metrics.gdt(predicted, chain, mask, metrics.GDT_HA_CUTOFFS)
    assert ours.item() == pytest.approx(expected, abs=1e-6)


def test_mirror_images_differ_only_after_superposition(chain: Tensor) -> None:
    mirror = chain * torch.tensor([1.0, 1.0, -1.0])
    mask = torch.ones(NUM).double()
    assert metrics.lddt(mirror, chain, mask).item() == 1
    assert metrics.drmsd(mirror, chain, mask).item() == pytest.approx(0, abs=1e-12)
    assert metrics.rmsd(mirror, chain, mask).item() > 3


def test_search_finds_the_half_that_fits(chain: Tensor) -> None:
    """A hinge: one half is right, the other turned away; all points at once miss it."""
    half = NUM // 2
    turn = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]).double()
    away = (chain[half:] - chain[half]) @ turn + chain[half] + 10
    predicted = noised(torch.cat((chain[:half], away)), 0.0)
    mask = torch.ones(NUM).double()
    assert metrics.gdt(predicted, chain, mask).item() < 0.35
    assert metrics.gdt(predicted, chain, mask, search=True).item() >= 0.5
    once = metrics.tm_score(predicted, chain, mask, search=False).item()
    found = metrics.tm_score(predicted, chain, mask).item()
    assert found > 0.5 > once


def test_drmsd_by_hand_and_its_gradient() -> None:
    true = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]).double()
    predicted = (2 * true).requires_grad_()
    mask = torch.ones(3).double()
    found = metrics.drmsd(predicted, true, mask)
    assert found.item() == pytest.approx(math.sqrt((1 + 1 + 2) / 3))
    for function in (metrics.drmsd, metrics.rmsd):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, true, mask), predicted)


def test_a_batch_is_its_chains(chain: Tensor) -> None:
    predicted = torch.stack([noised(chain, s, seed) for seed, s in enumerate((0.5, 1.0, 3.0))])
    true = chain.expand(3, NUM, 3)
    mask = torch.ones(3, NUM).double()
    mask[1, :20] = 0
    for function in (metrics.lddt, metrics.drmsd, metrics.rmsd, metrics.gdt, metrics.tm_score):
        together = function(predicted, true, mask)
        alone = torch.stack([function(*x) for x in zip(predicted, true, mask, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_scores_of_atoms_are_those_of_alpha_carbons(chain: Tensor) -> None:
    true = torch.zeros(NUM, 37, 3).double()
    true[:, metrics.CA] = chain
    predicted = torch.zeros_like(true)
    predicted[:, metrics.CA] = noised(chain, 1.0)
    mask = torch.zeros(NUM, 37)
    mask[5:, metrics.CA] = 1
    scores = metrics.score(predicted, true, mask)
    ca = (predicted[:, 1], true[:, 1], mask[:, 1].double())
    assert scores.lddt_ca == metrics.lddt(*ca) == metrics.lddt_ca(predicted, true, mask)
    assert scores.gdt_ha == metrics.gdt(*ca, metrics.GDT_HA_CUTOFFS) < scores.gdt_ts
    assert scores.rmsd_ca == metrics.rmsd(*ca)


def test_shapes_that_do_not_fit_are_named(chain: Tensor) -> None:
    with pytest.raises(FoldInputError, match=r"\(60, 3\), true ones \(59, 3\)"):
        metrics.lddt(chain, chain[:-1], torch.ones(NUM))
