"""Random numbers of ranks: which are alike, which differ, and that recomputation draws them again.

Ranks are tp=2 by dp=2, so 0 and 1 are tensor ranks of one replica, 2 and 3 of another.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.context import take_held
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.regions import recompute
from fivefold.parallel_core.rng import Replay, own_stream, seed_ranks
from fivefold.parallel_core.styles import SplitContext, SplitRandom, Style
from fivefold.parallel_core.topology import Topology

from . import gpt
from .imagined import imagined
from .test_context import Core as WholeCore
from .test_context import drawn

MODES = ("none", "selective", "full")


def styles(sequence: bool) -> dict[str, Style]:
    """Dropout between the layers sees whole tokens, or with ``sequence`` each rank's own."""
    between = ("attention_dropout", "mlp_dropout") if sequence else ()
    names = ("attention.core", *between)
    return {**gpt.plan(sequence), **{f"layers.*.{name}": SplitRandom() for name in names}}


@dataclass
class Found:
    whole: Tensor
    split: Tensor
    after: float
    outputs: dict[tuple[bool, str], list[Tensor]]


def on_a_rank() -> Found:
    topology = Topology(Layout(4, tp=2))
    seed_ranks(topology, 3)
    whole = nn.Dropout()
    split = SplitRandom().apply(nn.Dropout(), "split", ParameterTable(topology))
    ones = torch.ones(200)
    masks = whole(ones), split(ones)
    after = torch.rand(()).item()
    runs = {(s, mode): run(topology, s, mode) for s in (False, True) for mode in MODES}
    return Found(*masks, after, runs)


def run(topology: Topology, sequence: bool, mode: str) -> list[Tensor]:
    """Output and gradients of two blocks, from the same values and seeds."""
    torch.manual_seed(0)
    model = gpt.GPT(2)
    parallelize(model, topology, styles(sequence))
    recompute(model, mode)
    x = torch.randn(gpt.B, gpt.S // (2 if sequence else 1), gpt.H, requires_grad=True)
    seed_ranks(topology, 5)
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    return launch(on_a_rank, 4, timeout=120)


def test_masks_agree_where_activations_are_replicated(ranks: list[Found]) -> None:
    assert torch.equal(ranks[0].whole, ranks[1].whole)
    assert torch.equal(ranks[2].whole, ranks[3].whole)
    assert not torch.equal(ranks[0].whole, ranks[2].whole), "other data, other masks"


def test_masks_differ_where_activations_are_split(ranks: list[Found]) -> None:
    masks = [rank.split for rank in ranks] + [rank.whole for rank in ranks[::2]]
    for i, one in enumerate(masks):
        # Of 200 fair draws 100 agree; 60 and 140 are more than five deviations away.
        assert all(60 < (one == other).sum() < 140 for other in masks[:i])


def test_after_a_split_region_ranks_draw_alike_again(ranks: list[Found]) -> None:
    assert ranks[0].after == ranks[1].after
    assert ranks[2].after == ranks[3].after
    assert ranks[0].after != ranks[2].after


def test_replicated_activations_stay_equal_under_dropout(ranks: list[Found]) -> None:
    for mode in MODES:
        outputs = [rank.outputs[False, mode][0] for rank in ranks]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("mode", MODES[1:])
def test_recomputation_draws_the_same_again(ranks: list[Found], sequence: bool, mode: str) -> None:
    for rank in ranks:
        pairs = zip(rank.outputs[sequence, mode], rank.outputs[sequence, "none"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# ---- a ring --------------------------------------------------------------------------------


class RandomCore(WholeCore):
    """Attention with dropout of what each part of the keys gives."""

    def partial(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        out, lse = super().partial(q, k, v, offset)
        return torch.native_dropout(out, 0.5, True)[0], lse


def ring_on_a_rank() -> list[tuple[float, float, Tensor]]:
    topology = Topology(Layout(4, tp=2, cp=2))
    found = []
    for split in ("contiguous", "zigzag"):
        seed_ranks(topology, 7)
        style = SplitContext("ring", split, random="tp")  # type: ignore[arg-type]
        core = style.apply(RandomCore(), "core", ParameterTable(topology))
        axis = topology.axis("cp")
        q, k, v, weight = (take_held(x, axis, split) for x in drawn())  # type: ignore[arg-type]
        v = v.clone().requires_grad_()
        out = core(q, k, v)
        loss = (out * weight).sum()
        state = torch.get_rng_state()
        (gradient,) = torch.autograd.grad(loss, v)
        assert torch.equal(torch.get_rng_state(), state), "backward leaves the generator alone"
        found.append((loss.item(), (gradient * v).sum().item(), out.detach()))
    return found


def test_a_ring_with_dropout_has_the_gradient_of_its_own_forward() -> None:
    """The output is linear in the values where the masks are the same, so v · dL/dv is L."""
    ranks = launch(ring_on_a_rank, 4, timeout=120)
    for index in range(2):
        for tp in range(2):
            pair = [ranks[tp][index], ranks[tp + 2][index]]
            assert sum(p[1] for p in pair) == pytest.approx(sum(p[0] for p in pair), rel=1e-12)
        # Heads of two tensor ranks: these have the same values here, and other masks.
        assert not torch.equal(ranks[0][index][2], ranks[1][index][2])


# ---- one process ---------------------------------------------------------------------------


def test_seeds_are_alike_on_tensor_ranks_only() -> None:
    drawn_by = {}
    state = torch.get_rng_state()
    for topology in imagined(16, tp=2, cp=2, pp=2):
        seed_ranks(topology, 1, 2)
        drawn_by[topology.world_rank] = torch.rand(()).item()
    torch.set_rng_state(state)
    assert all(drawn_by[rank] == drawn_by[rank ^ 1] for rank in range(16))
    assert len(set(drawn_by.values())) == 8


def test_one_rank_draws_as_without_a_stream() -> None:
    alone = imagined(2, cp=2)[0].axis("tp")
    replay = Replay(torch.zeros(()))
    with own_stream(alone):
        inside = torch.rand(4)
    with replay.again():
        assert torch.equal(torch.rand(4), inside)
