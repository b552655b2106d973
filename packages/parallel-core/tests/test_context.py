"""Attention and positions of a sequence that is split over 4 ranks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.collectives import piece_along
from fivefold.parallel_core.context import GatheredContext, OffsetPositions
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.topology import Axis, Topology

from .toy import Core, Positions

CP_SIZES = (2, 4)
QUERIES, KEYS = (2, 8, 4, 3), (2, 8, 2, 3)  # B, S, heads, D: two query heads share a key head


class SharedHeads(nn.Module):
    """The toy's core, with consecutive query heads on one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.lengths = Core(), []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, query_start: int | None = None) -> Tensor:
        self.lengths.append(k.shape[1])
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return self.core(q, k, v, query_start)


def drawn() -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    shapes = (QUERIES, KEYS, KEYS, QUERIES)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def whole() -> list[Tensor]:
    """Output and gradients of queries, keys and values, in one process."""
    *inputs, weight = drawn()
    leaves = [x.requires_grad_() for x in inputs]
    out = SharedHeads()(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@dataclass
class Found:
    results: list[Tensor]
    sent: dict[tuple[str, str], tuple[int, float]]
    keys_read: list[int]
    positions: list[int]


def on_a_rank() -> dict[int, Found]:
    found = {}
    for cp in CP_SIZES:
        topology = Topology(Layout(4, cp=cp))
        axis = topology.axis("cp")
        *inputs, weight = (piece_along(x, axis, 1) for x in drawn())
        leaves = [x.clone().requires_grad_() for x in inputs]
        core = SharedHeads()
        with CommLedger(topology) as ledger:
            out = GatheredContext(core, axis)(*leaves)
            gradients = torch.autograd.grad((out * weight).sum(), leaves)
        found[cp] = Found(
            results=[out.detach(), *gradients],
            sent={key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()},
            keys_read=core.lengths,
            positions=OffsetPositions(Positions(), axis)(8 // cp).tolist(),
        )
    return found


@pytest.fixture(scope="module")
def job() -> list[dict[int, Found]]:
    return launch(on_a_rank, 4, timeout=300)


def axis_of(rank: int, cp: int) -> Axis:
    return Axis("cp", cp, rank % cp, tuple(range(cp)))


@pytest.mark.parametrize("cp", CP_SIZES)
def test_split_attention_equals_whole_attention(job: list[dict[int, Found]], cp: int) -> None:
    for rank, found in enumerate(job):
        for mine, wanted in zip(found[cp].results, whole(), strict=True):
            piece = piece_along(wanted, axis_of(rank, cp), 1)
            torch.testing.assert_close(mine, piece, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("cp", CP_SIZES)
def test_keys_and_values_travel_together_once_each_way(
    job: list[dict[int, Found]], cp: int
) -> None:
    both = 2 * torch.Size(KEYS).numel() * 8
    for found in job:
        once = (1, (cp - 1) / cp * both)
        assert found[cp].sent == {("all_gather", "cp"): once, ("reduce_scatter", "cp"): once}


@pytest.mark.parametrize("cp", CP_SIZES)
def test_no_rank_reads_keys_that_lie_after_its_queries(
    job: list[dict[int, Found]], cp: int
) -> None:
    for rank, found in enumerate(job):
        assert found[cp].keys_read == [(rank % cp + 1) * 8 // cp]


@pytest.mark.parametrize("cp", CP_SIZES)
def test_positions_go_on_from_rank_to_rank(job: list[dict[int, Found]], cp: int) -> None:
    assert [p for found in job[:cp] for p in found[cp].positions] == list(range(8))


def test_a_cache_is_refused() -> None:
    attention = GatheredContext(Core(), axis_of(0, 2))
    with pytest.raises(ValueError, match=r"key-value cache.*cp=2.*generate with cp=1"):
        attention(*drawn()[:3], query_start=3)
