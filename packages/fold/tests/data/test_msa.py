"""Steps of the MSA against what they are defined as, written out slowly, and their frequencies."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fivefold.fold.data import msa


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_deleted_blocks_never_hold_the_query() -> None:
    kept = [msa.undeleted_rows(100, rng(seed)) for seed in range(200)]
    assert all(rows[0] == 0 for rows in kept)
    assert all((np.diff(rows) > 0).all() for rows in kept)
    # Of a row far from both ends, five blocks of 30 miss each with probability 0.7.
    share = np.mean([50 in rows for rows in kept])
    assert share == pytest.approx(0.7**5, abs=0.08)
    assert msa.undeleted_rows(1, rng()).tolist() == [0]
    assert msa.undeleted_rows(3, rng()).tolist() == [0, 1, 2]  # a block of no row


def test_sampling_is_a_partition_that_begins_with_the_query() -> None:
    chosen, rest = msa.sampled_rows(20, 8, rng())
    assert chosen[0] == 0 and len(chosen) == 8
    assert sorted([*chosen, *rest]) == list(range(20))
    assert rest.tolist() != sorted(rest)
    chosen, rest = msa.sampled_rows(3, 8, rng())
    assert sorted(chosen) == [0, 1, 2] and not len(rest)


def test_masked_places_follow_the_four_ways() -> None:
    classes = torch.full((200, 300), 4)
    frequencies = torch.zeros(300, 22)
    frequencies[:, 7] = frequencies[:, 21] = 0.5
    found, mask = msa.masked(classes, frequencies, 0.15, rng())
    assert torch.equal(found[mask == 0], classes[mask == 0])
    assert mask.mean().item() == pytest.approx(0.15, abs=0.01)
    guess = found[mask == 1]
    share = torch.bincount(guess, minlength=23) / len(guess)
    expected = torch.full((23,), 0.1 / 20)
    expected[20:] = 0
    expected[22] = 0.7
    expected[4] += 0.1
    expected[7] += 0.05
    expected[21] += 0.05
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


def test_profile_counts_gaps() -> None:
    found = msa.profile(torch.tensor([[0, 21], [0, 3], [2, 3], [0, 21]]))
    assert found.shape == (2, 22)
    assert found[0, 0] == 0.75 and found[0, 2] == 0.25
    assert found[1, 21] == found[1, 3] == 0.5


def test_clusters_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msa, "_ROWS_AT_ONCE", 4)
    draw = rng(3)
    centres = torch.from_numpy(draw.integers(0, 23, (5, 11)))
    extra = torch.from_numpy(draw.integers(15, 22, (17, 11)))
    deletions = [torch.from_numpy(draw.integers(0, 4, x.shape)) for x in (centres, extra)]
    totals = F.one_hot(centres, 23).double()
    sums, counts = deletions[0].double(), torch.ones(5).double()
    for row, deleted in zip(extra, deletions[1], strict=True):
        agreement = [sum(int(a == b < 21) for a, b in zip(c, row, strict=True)) for c in centres]
        best = agreement.index(max(agreement))
        totals[best] += F.one_hot(row, 23)
        sums[best] += deleted
        counts[best] += 1
    found = msa.summarized(centres, deletions[0], extra, deletions[1])
    expected = totals / counts[:, None, None]
    torch.testing.assert_close(found.profile.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.deletions.double(), sums / counts[:, None], atol=1e-5, rtol=0)


def test_without_other_rows_a_cluster_is_its_centre() -> None:
    centres = torch.tensor([[3, 22]])
    none = torch.zeros(0, 2, dtype=torch.int64)
    found = msa.summarized(centres, torch.tensor([[2, 0]]), none, none)
    torch.testing.assert_close(found.profile, F.one_hot(centres, 23).float(), atol=2e-6, rtol=0)
    feat = msa.msa_feat(centres, torch.tensor([[2, 0]]), found)
    assert feat.shape == (1, 2, 49)
    assert feat[0, 0, 23] == 1 and feat[0, 1, 23] == 0
    expected = 2 / np.pi * np.arctan(2 / 3)
    assert feat[0, 0, 24].item() == pytest.approx(expected)
    assert feat[0, 0, 48].item() == pytest.approx(expected, abs=1e-5)
