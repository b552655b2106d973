"""Packed documents under every form of context parallelism, beside attention under a dense mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.context import ContextCore, GatheredContext, take_held
from fivefold.parallel_core.documents import (
    Block,
    Documents,
    attend_blocks,
    starts_after,
    starts_of_ids,
    starts_of_lengths,
)
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.sequence_split import SPLITS, held
from fivefold.parallel_core.topology import Topology

from .test_context import CP_SIZES, FORMS, B, Core, S, axis_of, drawn, kv_bytes

PACKINGS = {
    "many": ([1, 5, 1, 7, 2], [3, 13]),
    "one and ones": ([16], [1] * 16),
    "as ranks are": ([4, 4, 4, 4], [8, 8]),
    "alike": ([6, 10], [6, 10]),
}
"""Lengths of the documents of each sequence: across borders of ranks, of length 1, at borders."""
CASES = list(product(CP_SIZES, FORMS, SPLITS, PACKINGS, (None, 3)))


def starts_of(packing: str) -> Tensor:
    rows = [torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in PACKINGS[packing]]
    return torch.cat([starts_of_lengths(row, S) for row in rows])


def under_a_mask(packing: str, window: int | None) -> list[Tensor]:
    """Output and gradients with scores of all queries and keys, and those not seen left out."""
    *inputs, weight = drawn()
    q, k, v = leaves = [x.requires_grad_() for x in inputs]
    positions = torch.arange(S)
    apart = positions[:, None] - positions
    seen = (apart >= 0) & (apart < (window or S))
    starts = starts_of(packing)
    seen = seen & (starts[:, :, None] == starts[:, None, :])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bsht", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    out = torch.einsum("bsht,bthd->bshd", scores.softmax(-1), v)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@dataclass
class Found:
    results: list[Tensor]
    sent: dict[tuple[str, str], tuple[int, float]]
    lengths: list[int]


def on_a_rank() -> dict[tuple, Found]:
    # Groups take longer to make than attention takes here.
    topologies = {cp: Topology(Layout(4, cp=cp)) for cp in CP_SIZES}
    return {(cp, *case): _attend(topologies[cp], *case) for cp, *case in CASES}


def _attend(topology: Topology, form: str, split: str, packing: str, window: int | None) -> Found:
    axis = topology.axis("cp")
    parts = [take_held(x, axis, split) for x in drawn()]  # type: ignore[arg-type]
    leaves = [x.clone().requires_grad_() for x in parts[:3]]
    core = Core(window)
    attention: ContextCore = FORMS[form](core, axis, split)  # type: ignore[arg-type]
    documents = Documents(take_held(starts_of(packing), axis, split))  # type: ignore[arg-type]
    with CommLedger(topology) as ledger:
        out = attention(*leaves, documents=documents)
        attention(*leaves, documents=documents)  # as the next layer does
        lengths = list(core.lengths)
        gradients = torch.autograd.grad((out * parts[3]).sum(), leaves)
    sent = {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()}
    return Found([out.detach(), *gradients], sent, lengths)


@pytest.fixture(scope="module")
def job() -> list[dict[tuple, Found]]:
    return launch(on_a_rank, 4, timeout=300)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_documents_over_ranks_equal_a_mask_in_one_process(job: list[dict], case: tuple) -> None:
    cp, _, split, packing, window = case
    wanted = under_a_mask(packing, window)
    for rank, found in enumerate(job):
        for mine, whole in zip(found[case].results, wanted, strict=True):
            piece = take_held(whole, axis_of(rank, cp), split)
            torch.testing.assert_close(mine, piece, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("packing", "window"), [*product(PACKINGS, (None, 3))])
def test_documents_in_one_process_equal_a_mask(packing: str, window: int | None) -> None:
    *inputs, weight = drawn()
    leaves = [x.requires_grad_() for x in inputs]
    core = Core(window)
    out = Documents(starts_of(packing)).attend(core.partial, *leaves)
    found = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    for mine, whole in zip(found, under_a_mask(packing, window), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-13, atol=1e-13)
    longest = max(max(lengths) for lengths in PACKINGS[packing])
    assert max(core.lengths) <= 5 * longest // 4, "no scores between documents"


@pytest.mark.parametrize(("cp", "split"), [*product(CP_SIZES, SPLITS)])
def test_what_is_sent_does_not_depend_on_the_documents(
    job: list[dict], cp: int, split: str
) -> None:
    kv = kv_bytes(cp)
    for found, packing in product(job, PACKINGS):
        sent = {form: found[cp, form, split, packing, None].sent for form in FORMS}
        assert sent["gather"]["all_gather", "cp"] == (2, 2 * (cp - 1) * kv)
        assert sent["ring"] == {("send", "cp"): (4 * cp - 3, (4 * cp - 3) * kv)}
        # Once for both layers: the start of each token of the other ranks, 8 bytes.
        assert sent["heads"]["all_gather", "cp"] == (1, (cp - 1) * B * S / cp * 8)


@pytest.mark.parametrize("cp", CP_SIZES)
def test_a_ring_works_on_the_keys_of_its_own_documents_only(job: list[dict], cp: int) -> None:
    for found in job:
        # Documents that end where ranks do: no pair of different ranks has anything to do.
        lengths = found[cp, "ring", "contiguous", "as ranks are", None].lengths
        assert max(lengths) <= S // cp


def test_no_tokens_at_all() -> None:
    q, k, v, _ = (x[:, :0].requires_grad_() for x in drawn())
    documents = Documents(torch.zeros(B, 0, dtype=torch.long))
    out = documents.attend(Core().partial, q, k, v)
    assert out.shape == (B, 0, q.shape[2], v.shape[3])
    assert all(x.numel() == 0 for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_queries_in_no_block_have_no_output() -> None:
    q, k, v, _ = drawn()
    out, lse = attend_blocks(Core().partial, q, k, v, [Block(1, range(2, 4), range(3), 9)])
    seen = torch.zeros(B, S, dtype=torch.bool)
    seen[1, 2:4] = True
    assert out[~seen].eq(0).all()
    assert lse[~seen].isneginf().all()
    expected, _ = Core().partial(q[1:, 2:4], k[1:, :3], v[1:, :3], 9)
    torch.testing.assert_close(out[1, 2:4], expected[0])


# ---- starts and positions ------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1, 5, 1, 7, 2], [16], [1] * 16, [4, 0, 12]])
def test_starts_from_ids_lengths_and_ends_agree(lengths: Sequence[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    starts = starts_of_lengths(bounds, S)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(starts_of_ids(document[None] * 3 % 11), starts)
    ids = torch.ones(1, S, dtype=torch.long)
    ids[0, bounds[1:] - 1] = 9
    assert torch.equal(starts_after(ids, 9), starts)
    inside = [i for n in lengths for i in range(n)]
    assert Documents(starts).positions(torch.arange(S)).tolist() == [inside]


@pytest.mark.parametrize(("cp", "split"), [*product(CP_SIZES, SPLITS)])
def test_positions_start_again_in_each_document_whoever_holds_it(cp: int, split: str) -> None:
    starts = starts_of("many")
    for rank in range(cp):
        mine = take_held(starts, axis_of(rank, cp), split)  # type: ignore[arg-type]
        positions = torch.tensor([p for at in held(S, cp, rank, split) for p in at])  # type: ignore[arg-type]
        found = Documents(mine).positions(positions)
        whole = [[i for n in row for i in range(n)] for row in PACKINGS["many"]]
        assert torch.equal(found, torch.tensor(whole)[:, positions])


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [[], [1, 16], [0, 15], [0, 9, 5, 16]])
def test_lengths_that_are_none_of_a_sequence_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"cu_seqlens=.* of 16 tokens; it rises from 0 to 16"):
        starts_of_lengths(torch.tensor(bounds), 16)


@pytest.mark.parametrize("starts", [torch.zeros(2, 4), torch.zeros(4, dtype=torch.long)])
def test_starts_are_integers_for_each_token(starts: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"integers \(sequences, tokens\); found torch"):
        Documents(starts)


@pytest.mark.parametrize(("starts", "position"), [([0, 0, 1, 1], 2), ([0, 3, 3, 3], 1), ([-1], 0)])
def test_starts_that_are_those_of_no_documents_are_refused(
    starts: list[int], position: int
) -> None:
    documents = Documents(torch.tensor([starts]))
    with pytest.raises(ConfigError, match=rf"token at position {position} says .* starts at"):
        documents.blocks(range(len(starts)), 0, range(len(starts)))


def test_starts_must_be_those_of_the_tokens_here() -> None:
    with pytest.raises(ConfigError, match=r"shape \(2, 8\) for 2 sequences of 16 tokens here"):
        GatheredContext(Core(), axis_of(0, 2))(
            *drawn()[:3], documents=Documents(torch.zeros(2, 8, dtype=torch.long))
        )


def test_a_core_that_cannot_take_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"core with partial\(q, k, v, offset\), which Identity"):
        GatheredContext(nn.Identity(), axis_of(0, 2)).partial  # noqa: B018
