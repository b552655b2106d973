"""Attention over a sequence that is split over ranks, in every form, beside whole attention."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.context import (
    ContextCore,
    GatheredContext,
    HeadsContext,
    SplitPositions,
    gather_held,
    take_held,
)
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.ring import RingContext
from fivefold.parallel_core.sequence_split import SPLITS, held
from fivefold.parallel_core.topology import Axis, Topology

from .toy import Positions

CP_SIZES = (2, 4)
FORMS = {"gather": GatheredContext, "ring": RingContext, "heads": HeadsContext}
B, S, HEADS, KEY_HEADS, D = 2, 16, 8, 2, 3
CASES = list(product(CP_SIZES, FORMS, SPLITS))
FULL = torch.finfo(torch.float64)


class Core(nn.Module):
    """Causal attention of a few lines, with shared key heads and, if asked, a window."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.lengths = window, []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, query_start: int | None = None) -> Tensor:
        start = k.shape[1] - q.shape[1] if query_start is None else query_start
        return self.partial(q, k, v, start)[0]

    def partial(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        self.lengths.append(k.shape[1])
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bsht", q, k) / q.shape[-1] ** 0.5
        last = offset + torch.arange(q.shape[1]).unsqueeze(1)
        keys = torch.arange(k.shape[1])
        seen = keys <= last
        if self.window is not None:
            seen &= keys > last - self.window
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        none = lse.isneginf()
        weights = (scores - lse.masked_fill(none, 0).unsqueeze(-1)).exp()
        return torch.einsum("bsht,bthd->bshd", weights, v), lse


def drawn() -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    shapes = (
        (B, S, HEADS, D),
        (B, S, KEY_HEADS, D),
        (B, S, KEY_HEADS, D + 1),
        (B, S, HEADS, D + 1),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def whole(window: int | None) -> list[Tensor]:
    """Output and gradients of queries, keys and values, in one process."""
    *inputs, weight = drawn()
    leaves = [x.requires_grad_() for x in inputs]
    out = Core(window)(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@dataclass
class Found:
    results: list[Tensor]
    sent: dict[tuple[str, str], tuple[int, float]]
    keys_read: list[int]
    kept: int
    positions: list[int]
    restored: bool


def on_a_rank(window: int | None) -> dict[tuple, Found]:
    return {case: _attend(*case, window) for case in CASES}


def _attend(cp: int, form: str, split: str, window: int | None) -> Found:
    topology = Topology(Layout(4, cp=cp))
    axis = topology.axis("cp")
    parts = [take_held(x, axis, split) for x in drawn()]
    leaves = [x.clone().requires_grad_() for x in parts[:3]]
    core = Core(window)
    attention: ContextCore = FORMS[form](core, axis, split)
    with CommLedger(topology) as ledger, ActivationLedger(attention) as activations:
        out = attention(*leaves)
        kept, keys_read = activations.live, list(core.lengths)
        gradients = torch.autograd.grad((out * parts[3]).sum(), leaves)
    return Found(
        results=[out.detach(), *gradients],
        sent={key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()},
        keys_read=keys_read,
        kept=kept,
        positions=SplitPositions(Positions(), axis, split)(S // cp).tolist(),
        restored=torch.equal(gather_held(parts[0], axis, split), drawn()[0]),
    )


@pytest.fixture(scope="module")
def job() -> list[dict[tuple, Found]]:
    return launch(on_a_rank, 4, None, timeout=300)


@pytest.fixture(scope="module")
def windowed() -> list[dict[tuple, Found]]:
    return launch(on_a_rank, 4, 5, timeout=300)


def axis_of(rank: int, cp: int) -> Axis:
    return Axis("cp", cp, rank % cp, tuple(range(cp)))


def assert_whole(job: list[dict[tuple, Found]], case: tuple, window: int | None) -> None:
    cp, _, split = case
    for rank, found in enumerate(job):
        for mine, wanted in zip(found[case].results, whole(window), strict=True):
            piece = take_held(wanted, axis_of(rank, cp), split)
            torch.testing.assert_close(mine, piece, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_attention_equals_whole_attention(job: list[dict], case: tuple) -> None:
    assert_whole(job, case, None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_a_window_some_queries_see_nothing_of_a_part(
    windowed: list[dict], case: tuple
) -> None:
    assert_whole(windowed, case, 5)


def kv_bytes(cp: int) -> float:
    return B * S // cp * KEY_HEADS * (2 * D + 1) * 8


@pytest.mark.parametrize(("cp", "split"), [*product(CP_SIZES, SPLITS)])
def test_bytes_of_each_form(job: list[dict], cp: int, split: str) -> None:
    kv = kv_bytes(cp)
    gathered = (1, (cp - 1) * kv)
    # Ulysses sends all but one of cp parts of each tensor; key heads are repeated up to cp.
    heads = max(KEY_HEADS, cp)
    token = HEADS * D + heads * (2 * D + 1) + HEADS * (D + 1)
    exchanged = 2 * (cp - 1) / cp * B * S / cp * token * 8
    for found in job:
        assert found[cp, "gather", split].sent == {
            ("all_gather", "cp"): gathered,
            ("reduce_scatter", "cp"): gathered,
        }
        # The keys and values pass cp - 1 ranks, twice; their gradients go one hop further, home.
        ring = found[cp, "ring", split].sent
        assert ring == {("send", "cp"): (3 * cp - 2, (3 * cp - 2) * kv)}
        assert found[cp, "heads", split].sent == {("all_to_all", "cp"): (8, exchanged)}


@pytest.mark.parametrize("cp", CP_SIZES)
def test_what_the_ring_keeps_does_not_grow_with_the_ranks(job: list[dict], cp: int) -> None:
    token = HEADS * D + KEY_HEADS * (2 * D + 1) + HEADS * (D + 1) + HEADS
    for found, split in product(job, SPLITS):
        assert found[cp, "ring", split].kept == B * S // cp * token * 8


@pytest.mark.parametrize("cp", CP_SIZES)
def test_zigzag_gives_every_rank_the_same_work(job: list[dict], cp: int) -> None:
    def work(split: str) -> list[int]:
        # Keys that the ring's calls of the core read, for as many queries each time.
        return [sum(found[cp, "ring", split].keys_read) for found in job[:cp]]

    piece = S // cp
    assert work("contiguous") == [piece * (rank + 1) for rank in range(cp)]
    assert work("zigzag") == [piece // 2 * (2 * cp + 1)] * cp


@pytest.mark.parametrize("cp", CP_SIZES)
def test_no_rank_reads_gathered_keys_that_lie_after_its_queries(job: list[dict], cp: int) -> None:
    for rank, split in product(range(cp), SPLITS):
        stops = [at.stop for at in held(S, cp, rank, split)]
        assert job[rank][cp, "gather", split].keys_read == stops


@pytest.mark.parametrize(("cp", "split"), [*product(CP_SIZES, SPLITS)])
def test_positions_and_order(job: list[dict], cp: int, split: str) -> None:
    for rank, found in enumerate(job):
        expected = [p for at in held(S, cp, rank % cp, split) for p in at]
        assert found[cp, "gather", split].positions == expected
        assert found[cp, "gather", split].restored


@pytest.mark.parametrize("form", FORMS.values())
def test_a_cache_is_refused(form: type[ContextCore]) -> None:
    attention = form(Core(), axis_of(0, 2))
    with pytest.raises(ValueError, match=r"key-value cache.*cp=2.*generate with cp=1"):
        attention(*drawn()[:3], query_start=3)


@pytest.mark.parametrize(("cp", "heads", "key_heads"), [(4, 6, 2), (4, 12, 3)])
def test_heads_that_do_not_divide_are_named(cp: int, heads: int, key_heads: int) -> None:
    q, k = torch.zeros(1, 2, heads, D), torch.zeros(1, 2, key_heads, D)
    with pytest.raises(
        ConfigError, match=rf"cp=4 .* {heads} query heads, .* {key_heads} key heads"
    ):
        HeadsContext(Core(), axis_of(0, cp))(q, k, k)


def test_a_form_without_attention_cannot_be_made() -> None:
    class Nothing(ContextCore):
        pass

    with pytest.raises(TypeError, match=r"abstract method.*attend"):
        Nothing(Core(), axis_of(0, 2))
