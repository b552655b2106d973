"""Every dispatcher against the local one that has all ranks' tokens, in float64.

Legend: N tokens of a rank, K experts per token, E experts, H hidden width, F expert width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.dispatchers import DISPATCHERS, DispatchConfig, dispatcher_for, folded_dispatcher
from fivefold.moe.errors import MoEInputError
from fivefold.moe.experts import Experts
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.topology import Topology

H, F = 6, 8
ROW = H * 8  # bytes of a row
UNEVEN = (3, 0, 5, 1, 0, 7, 2, 4)


@dataclass(frozen=True)
class Case:
    """Layout, experts and tokens of one exchange.

    Attributes:
        world: number of ranks.
        degrees: of ``Layout``, as pairs.
        num_tokens: of each rank; the first ``world`` count.
        only: all tokens go to the ``num_copies`` experts from this one on; None spreads them.
        dropped: share of the copies that no expert takes.
        pad: whether each expert gets as many rows from each rank, one more than any has copies.
        kind: of the dispatcher.
    """

    world: int
    degrees: tuple[tuple[str, int | str], ...]
    num_experts: int = 8
    num_copies: int = 2
    num_tokens: tuple[int, ...] = (5,) * 8
    only: int | None = None
    dropped: float = 0.0
    pad: bool = False
    kind: str = "all_to_all"

    def __str__(self) -> str:
        words = [f"{name}={degree}" for name, degree in self.degrees]
        words += [f"E={self.num_experts}", f"K={self.num_copies}"]
        words += ["uneven"] * (len(set(self.num_tokens)) > 1)
        words += [] if self.only is None else [f"all to {self.only}"]
        words += [f"{self.dropped:.0%} dropped"] * (self.dropped > 0) + ["padded"] * self.pad
        return " ".join([self.kind, *words])

    @property
    def pad_to(self) -> int | None:
        """Rows of each expert from each rank, the same on all."""
        counts = [exchange_of(self, rank).kept_per_expert() for rank in range(self.world)]
        return int(torch.cat(counts).max()) + 1 if self.pad else None

    @property
    def layout(self) -> Layout:
        return Layout(self.world, **dict(self.degrees))  # type: ignore[arg-type]


def case(world: int = 8, /, **values: Any) -> Case:
    """A case; what is not its own is the layout's."""
    names = ("num_experts", "num_copies", "num_tokens", "only", "dropped", "pad")
    own = {name: values.pop(name) for name in names if name in values}
    return Case(world, tuple(values.items()), **own)


EXCHANGES = [
    case(2, ep=2),
    case(2, ep=2, dropped=0.4),
    case(2, ep=2, dropped=0.4, pad=True),
    case(4, ep=2, etp=2, tp=2, dropped=0.3, pad=True, num_copies=3),
    case(ep=8, dropped=1.0, num_tokens=UNEVEN),
    case(ep=8, num_copies=4, dropped=0.5, num_tokens=UNEVEN),
    case(etp=2, ep=4, num_copies=3, pad=True),
    case(etp=2, ep=2, order="dp-ep-tp-cp-pp", dropped=0.5, num_copies=5, num_tokens=UNEVEN),
    case(2, etp=2, tp=2),
    case(2, ep=2, num_experts=6, num_copies=6, num_tokens=(4, 0)),
    case(4, ep=2, etp=2, tp=2),
    case(4, ep=4, num_experts=4, num_tokens=(0, 1, 6, 2)),
    case(4, etp=2, ep=2, order="ep-tp-cp-dp-pp", num_tokens=(2, 5, 0, 3)),
    case(tp=2, cp=2, ep=8),
    case(ep=8, num_experts=24, num_copies=3, num_tokens=UNEVEN),
    case(tp=2, ep=4, num_experts=12),
    case(tp=2, cp=2, ep=4, etp=2, num_tokens=UNEVEN),
    case(tp=2, etp=4, ep=2),
    case(tp=4, etp=2, ep=2, num_tokens=UNEVEN),
    case(tp=2, etp=8),
    case(etp=4),
    case(ep=4, order="tp-dp-ep-cp-pp", num_tokens=UNEVEN),
    case(etp=2, ep=2, order="dp-ep-tp-cp-pp"),
    case(etp=2, ep=4, order="ep-tp-cp-dp-pp", num_tokens=UNEVEN),
    case(tp=2, pp=2, etp=2, ep=2, num_tokens=UNEVEN),
    case(tp=2, pp=2, ep=4, num_experts=12, num_copies=4),
    case(ep=8, num_copies=1, only=3),
    case(etp=2, ep=4, num_copies=1, only=7, num_tokens=UNEVEN),
    case(etp=2, ep=2, num_copies=2, only=0, num_tokens=(0, 0, 9, 0, 0, 0, 0, 0)),
    case(ep=8, num_copies=8, num_tokens=UNEVEN),
    case(etp=2, ep=4, num_tokens=(0,) * 8),
]
CASES = [
    replace(c, kind=k) for k in DISPATCHERS for c in EXCHANGES if k == "all_to_all" or not c.pad
]


@dataclass
class Exchange:
    """Inputs, and after ``run`` the output; tensors of one rank or of all."""

    tokens_nh: Tensor
    experts_nk: Tensor
    weights_nk: Tensor
    slope_nh: Tensor
    kept_nk: Tensor
    num_experts: int
    out_nh: Tensor | None = None

    def kept_per_expert(self) -> Tensor:
        return self.experts_nk[self.kept_nk].bincount(minlength=self.num_experts)

    def run(
        self, dispatcher: TokenDispatcher, experts: nn.Module, pad_to: int | None = None
    ) -> None:
        """Forward and backward of ``sum(slope * out)``."""
        kept_nk = None if self.kept_nk.all() else self.kept_nk
        self.tokens_nh.requires_grad_()
        self.weights_nk.requires_grad_()
        rows, counts, state = dispatcher.dispatch(self.tokens_nh, self.experts_nk, kept_nk, pad_to)
        self.out_nh = dispatcher.combine(experts(rows, counts), self.weights_nk, state)
        (self.out_nh * self.slope_nh).sum().backward()


def exchange_of(case: Case, rank: int) -> Exchange:
    """What one rank brings; every rank's is different."""
    generator = torch.Generator().manual_seed(rank)
    n, e, k = case.num_tokens[rank], case.num_experts, case.num_copies

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    experts_nk = draw(n, e).argsort(dim=1)[:, :k]
    if case.only is not None:
        experts_nk = torch.arange(case.only, case.only + k).expand(n, k)
    tokens, weights, slope = draw(n, H), draw(n, k), draw(n, H)
    kept = torch.rand(n, k, generator=generator) >= case.dropped
    return Exchange(tokens, experts_nk, weights, slope, kept, e)


def whole_experts(case: Case) -> Experts:
    """All experts with their whole width."""
    experts = Experts(case.num_experts, H, F).double()
    generator = torch.Generator().manual_seed(99)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return experts


def held_slices(case: Case, rank: int) -> tuple[slice, slice]:
    """Which experts a rank holds, and which part of their width."""
    at, layout = case.layout.coordinates(rank), case.layout
    num, width = case.num_experts // layout.ep, F // layout.etp
    return (
        slice(at["ep"] * num, (at["ep"] + 1) * num),
        slice(at["etp"] * width, (at["etp"] + 1) * width),
    )


def held_experts(case: Case, rank: int) -> Experts:
    """What one rank holds of ``whole_experts``."""
    experts = whole_experts(case)
    which, width = held_slices(case, rank)
    experts.gate_up = nn.Parameter(experts.gate_up[which, :, width].detach().clone())
    experts.down = nn.Parameter(experts.down[which, :, width].detach().clone())
    return experts


@dataclass
class Left:
    """What a rank has after the backward."""

    out: Tensor
    tokens: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    sent: Mapping[tuple[str, str], tuple[int, float]]


def run_ranks(cases: list[Case]) -> list[Left]:
    """On each rank: all cases, one after the other."""
    return [run_rank(case, Topology(case.layout)) for case in cases]


def run_rank(case: Case, topology: Topology) -> Left:
    exchange = exchange_of(case, topology.world_rank)
    experts = held_experts(case, topology.world_rank)
    config = DispatchConfig(dispatcher=case.kind)  # type: ignore[arg-type]
    dispatcher = dispatcher_for(config, case.num_experts, topology)
    with CommLedger(topology) as ledger:
        exchange.run(dispatcher, experts, case.pad_to)
    return Left(
        out=exchange.out_nh.detach(),
        tokens=exchange.tokens_nh.grad,
        weights=exchange.weights_nk.grad,
        gate_up=experts.gate_up.grad,
        down=experts.down.grad,
        sent={key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()},
    )


@cache
def results(world: int) -> Mapping[Case, list[Left]]:
    """Every case of a world, by rank; all in one launch."""
    cases = [case for case in CASES if case.world == world]
    by_rank = launch(run_ranks, world, cases, timeout=300)
    return dict(zip(cases, map(list, zip(*by_rank, strict=True)), strict=True))


@cache
def reference(case: Case) -> tuple[Exchange, Experts]:
    """The local dispatcher with the tokens of all ranks."""
    of_ranks = [exchange_of(case, rank) for rank in range(case.world)]
    names = ("tokens_nh", "experts_nk", "weights_nk", "slope_nh", "kept_nk")
    parts = [torch.cat([getattr(e, name) for e in of_ranks]) for name in names]
    together = Exchange(*parts, case.num_experts)
    experts = whole_experts(case)
    together.run(TokenDispatcher(case.num_experts), experts)
    return together, experts


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_see_their_experts(case: Case) -> None:
    ranks, (together, _) = results(case.world)[case], reference(case)
    assert_equal(torch.cat([rank.out for rank in ranks]), together.out_nh)
    assert_equal(torch.cat([rank.tokens for rank in ranks]), together.tokens_nh.grad)
    assert_equal(torch.cat([rank.weights for rank in ranks]), together.weights_nk.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_see_all_tokens(case: Case) -> None:
    ranks, (_, experts) = results(case.world)[case], reference(case)
    gate_up, down = (torch.zeros_like(p) for p in experts.parameters())
    for number, rank in enumerate(ranks):
        # Ranks along the data axis each leave the part of their own tokens.
        which, width = held_slices(case, number)
        gate_up[which, :, width] += rank.gate_up
        down[which, :, width] += rank.down
    assert_equal(gate_up, experts.gate_up.grad)
    assert_equal(down, experts.down.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_of_the_rows(case: Case) -> None:
    for number, rank in enumerate(results(case.world)[case]):
        assert rank.sent == expected_traffic(case, number)


def expected_traffic(case: Case, rank: int) -> dict[tuple[str, str], tuple[int, float]]:
    """Calls and bytes of one rank, forward and backward, from the routing alone."""
    return {"all_to_all": _copies, "deduplicated": _tokens_once, "all_gather": _all_tokens}[
        case.kind
    ](case, rank)


Traffic = dict[tuple[str, str], tuple[int, float]]
WORD = 8.0  # bytes of an integer, and of a weight


def _wanted(case: Case, source: int, target: int) -> Tensor:
    """Which copies ``source`` has for the experts of ``target`` (N, K)."""
    num = case.num_experts // case.layout.ep
    first = case.layout.coordinates(target)["ep"] * num
    exchange = exchange_of(case, source)
    experts = exchange.experts_nk
    return (experts >= first) & (experts < first + num) & exchange.kept_nk


def _peers(case: Case, axis: str, rank: int) -> list[int]:
    return [peer for peer in case.layout.group_of(axis, rank) if peer != rank]


def _copies(case: Case, rank: int) -> Traffic:
    """A row for each copy; its ETP peers get what it received."""
    layout = case.layout

    def rows(source: int, target: int) -> int:
        if case.pad_to is not None:
            return case.pad_to * case.num_experts // layout.ep
        return int(_wanted(case, source, target).sum())

    def arrived(target: int) -> int:
        return sum(rows(source, target) for source in layout.group_of("ep", target))

    both = layout.axis_size("etp-ep")
    traffic: Traffic = {}
    if not case.pad:
        traffic["all_gather", "etp-ep"] = (1, (both - 1) * case.num_experts * WORD)
    if peers := _peers(case, "ep", rank):
        moved = sum(rows(rank, peer) + rows(peer, rank) for peer in peers)
        traffic["all_to_all", "ep"] = (4, 2.0 * moved * ROW)
    if peers := _peers(case, "etp", rank):
        moved = len(peers) * arrived(rank) + sum(arrived(peer) for peer in peers)
        traffic["all_to_all", "etp"] = (4, 2.0 * moved * ROW)
    return traffic


def _tokens_once(case: Case, rank: int) -> Traffic:
    """A row for each rank of a token, with its experts and their weights."""
    layout, num_copies = case.layout, case.num_copies

    def rows(source: int, target: int) -> int:
        return int(_wanted(case, source, target).any(dim=1).sum())

    def arrived(target: int) -> int:
        return sum(rows(source, target) for source in layout.group_of("ep", target))

    both = layout.axis_size("etp-ep")
    traffic: Traffic = {("all_gather", "etp-ep"): (1, (both - 1) * layout.ep * WORD)}
    # Tokens and sums there and back; experts there, weights there and their gradients back.
    if peers := _peers(case, "ep", rank):
        out = sum(rows(rank, peer) for peer in peers)
        back = sum(rows(peer, rank) for peer in peers)
        words = num_copies * WORD * (2 * out + back)
        traffic["all_to_all", "ep"] = (7, 2.0 * (out + back) * ROW + words)
    if peers := _peers(case, "etp", rank):
        out, back = len(peers) * arrived(rank), sum(arrived(peer) for peer in peers)
        words = num_copies * WORD * (2 * out + back)
        traffic["all_to_all", "etp"] = (7, 2.0 * (out + back) * ROW + words)
    return traffic


def _all_tokens(case: Case, rank: int) -> Traffic:
    """All tokens with their experts and weights to all, sums and weights' gradients back."""
    peers, num_copies = _peers(case, "etp-ep", rank), case.num_copies
    out = len(peers) * case.num_tokens[rank]
    back = sum(case.num_tokens[peer] for peer in peers)
    words = num_copies * WORD * (2 * out + back) + len(peers) * WORD
    return {("all_to_all", "etp-ep"): (8, 2.0 * (out + back) * ROW + words)}


@pytest.mark.parametrize("kind", ["deduplicated", "all_gather"])
def test_only_rows_can_be_padded(kind: str) -> None:
    dispatcher = dispatcher_for(DispatchConfig(dispatcher=kind), 4, Topology.local())  # type: ignore[arg-type]
    with pytest.raises(MoEInputError, match="padding to 3 rows is for dispatchers that send"):
        dispatcher.dispatch(torch.zeros(2, H), torch.zeros(2, 1, dtype=torch.int64), None, 3)


def test_whole_experts_need_no_folding() -> None:
    local, other = TokenDispatcher(4), nn.Identity()
    assert folded_dispatcher(local, Topology.local()) is local
    assert folded_dispatcher(other, Topology.local()) is other
