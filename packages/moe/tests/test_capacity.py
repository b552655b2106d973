"""Which copies experts take, against a listing by hand.

Legend: B sequences, S tokens, K experts per token, E experts.
"""

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fivefold.moe.capacity import Capacity
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.split_sequences import SplitSequences
from fivefold.parallel_core.collectives import piece_along
from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology

FACTORS = [0.1, 0.3, 0.75, 1.0, 1.25, 3.0, 1e6]


def routing(b: int, s: int, k: int, e: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Experts, crowded on the first ones, and weights of which some are equal."""
    generator = torch.Generator().manual_seed(seed)
    crowd = torch.arange(e) * 0.3
    experts = (torch.rand(b, s, e, generator=generator) + crowd).argsort(-1)[..., :k]
    weights = torch.randint(1, 6, (b, s, k), generator=generator) / 5
    return experts, weights


def by_hand(
    pools: Iterable[list[tuple[int, int]]], experts: Tensor, weights: Tensor, config: CapacityConfig
) -> Tensor:
    """Serve the experts one after the other; a pool is tokens (b, s) in order of position."""
    num_experts, k = int(experts.max()) + 1, experts.shape[-1]
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for pool in pools:
        for expert in range(num_experts):
            copies = [
                (-float(weights[b, s, i]) if config.keep == "weight" else 0.0, place, (b, s, i))
                for place, (b, s) in enumerate(pool)
                for i in range(k)
                if int(experts[b, s, i]) == expert
            ]
            for _, _, where in sorted(copies)[: capacity_of(config, len(pool), k)]:
                kept[where] = True
    return kept


E = 6


def capacity_of(config: CapacityConfig, num_tokens: int, k: int) -> int:
    assert config.factor is not None
    return math.ceil(round(config.factor * num_tokens * k / E, 9))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("keep", ["weight", "position"])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_survivors_among_a_rank(factor: float, keep: str, k: int) -> None:
    config = CapacityConfig(factor=factor, keep=keep)  # type: ignore[arg-type]
    experts, weights = routing(3, 7, k, E)
    pool = [(b, s) for b in range(3) for s in range(7)]
    found = Capacity(config, E)(experts, weights)
    assert torch.equal(found, by_hand([pool], experts, weights, config))
    assert found.any() and (factor < 1e6 or bool(found.all()))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("keep", ["weight", "position"])
def test_survivors_among_a_sequence(factor: float, keep: str) -> None:
    config = CapacityConfig(factor=factor, keep=keep, among="sequence")  # type: ignore[arg-type]
    experts, weights = routing(3, 7, 2, E)
    pools = [[(b, s) for s in range(7)] for b in range(3)]
    found = Capacity(config, E)(experts, weights)
    assert torch.equal(found, by_hand(pools, experts, weights, config))


def test_without_a_factor_all_stay() -> None:
    experts, weights = routing(2, 5, 2, E)
    assert Capacity(CapacityConfig(), E)(experts, weights).all()


def kept_on_ranks(configs: list[CapacityConfig], layouts: list[Layout]) -> list[list[Tensor]]:
    """What each rank keeps of the same sequences, under every configuration, layout and split."""
    experts, weights = routing(2, 16, 2, E, seed=3)
    found = []
    for layout in layouts:
        topology = Topology(layout)
        tp, cp = topology.axis("tp"), topology.axis("cp")
        for split in ("contiguous", "zigzag"):
            wholes = (experts, weights, torch.arange(32).view(2, 16))
            here = [piece_along(take_held(x, cp, split), tp, 1) for x in wholes]
            for config in configs:
                capacity = Capacity(config, E)
                capacity.sequences = SplitSequences(topology, split)
                found.append([capacity(here[0], here[1]), here[2]])
    return found


def test_full_sequence_dropping_does_not_depend_on_the_split() -> None:
    configs = [
        CapacityConfig(factor=factor, keep=keep, among="sequence")  # type: ignore[arg-type]
        for factor in (0.3, 0.75)
        for keep in ("weight", "position")
    ]
    layouts = [Layout(4, tp=4), Layout(4, cp=4), Layout(4, tp=2, cp=2), Layout(4, tp=2), Layout(4)]
    experts, weights = routing(2, 16, 2, E, seed=3)
    whole = [Capacity(config, E)(experts, weights).view(32, 2) for config in configs]
    by_rank = launch(kept_on_ranks, 4, configs, layouts)
    assert len({len(rank) for rank in by_rank}) == 1 and len(by_rank[0]) == 5 * 2 * 4
    for rank in by_rank:
        for number, (kept, positions) in enumerate(rank):
            assert torch.equal(kept, whole[number % 4][positions])


def kept_alone(config: CapacityConfig, split: Split) -> tuple[Tensor, Tensor]:
    topology = Topology(Layout(2, cp=2))
    cp = topology.axis("cp")
    experts, weights, place = (
        take_held(x, cp, split) for x in (*routing(2, 16, 2, E), torch.arange(32).view(2, 16))
    )
    capacity = Capacity(config, E)
    capacity.sequences = SplitSequences(topology, split)
    return capacity(experts, weights), place


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_sub_sequence_dropping_is_each_ranks_own(split: Split) -> None:
    config = CapacityConfig(factor=0.75, keep="position")
    experts, weights = routing(2, 16, 2, E)
    for kept, place in launch(kept_alone, 2, config, split):
        pool = [(int(p) // 16, int(p) % 16) for p in place.flatten()]
        wanted = by_hand([pool], experts, weights, config).view(32, 2)[place]
        assert torch.equal(kept, wanted) and not kept.all()


@pytest.mark.parametrize("among", ["rank", "sequence"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0])
def test_no_expert_has_more_rows_than_announced(among: str, factor: float) -> None:
    config = CapacityConfig(factor=factor, among=among)  # type: ignore[arg-type]
    capacity = Capacity(config, E)
    most = capacity.most_rows(3, 7, 2)
    for seed in range(20):
        experts, weights = routing(3, 7, 2, E, seed)
        counts = experts[capacity(experts, weights)].bincount(minlength=E)
        assert int(counts.max()) <= most
    assert most <= 21


def test_capacity_is_rounded_up_but_not_by_the_last_bit() -> None:
    # 0.1 * 30 * 2 / 6 is 1.0000000000000002 in float64.
    assert CapacityConfig(factor=0.1).rows(30, 2, 6) == 1
    assert CapacityConfig(factor=0.11).rows(30, 2, 6) == 2
    assert CapacityConfig(factor=1e9).rows(30, 2, 6) == 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.0}, r"capacity.factor is 0\.0; it must be above 0 and finite"),
        ({"factor": float("inf")}, "capacity.factor is inf"),
        ({"pad": True}, "capacity.pad is true without capacity.factor"),
    ],
)
def test_impossible_values(values: dict[str, float], message: str) -> None:
    with pytest.raises(MoEConfigError, match=message):
        CapacityConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(MoEConfigError, match="not given, so an expert takes all"):
        CapacityConfig().rows(3, 1, 2)
