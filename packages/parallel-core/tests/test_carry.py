"""A mixer of a package's own over a split sequence: a convolution and a linear recurrence.

Legend: B sequences, S tokens of the whole sequence, P tokens here, C channels, N pieces here.
"""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.carry import from_before, gather_pieces, halo, incoming, piece_numbers
from fivefold.parallel_core.context import SplitMixer, SplitPositions, take_held
from fivefold.parallel_core.documents import Documents, starts_of_lengths
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.ledger import CommLedger
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.sequence_split import SPLITS, Split
from fivefold.parallel_core.styles import SplitContext
from fivefold.parallel_core.topology import Axis, Topology

from .imagined import imagined
from .test_context import axis_of
from .toy import Positions

B, S, C, WIDTH = 2, 32, 3, 4
CP_SIZES = (2, 4)
LENGTHS = ([1, 5, 1, 20, 5], [16, 16])
CASES = list(product(CP_SIZES, SPLITS, (False, True)))


class Mixer(nn.Module):
    """y_t = d_t y_{t-1} + (convolution of the last WIDTH values of x), channel by channel."""

    def forward(
        self, x: Tensor, decay: Tensor, taps: Tensor, documents: Documents | None = None
    ) -> Tensor:
        begins = begin_of_documents(documents, torch.arange(x.shape[1]), x)
        before = x.new_zeros(x.shape[0], WIDTH - 1, x.shape[2])
        return recur(convolve(x, before, taps, begins), decay, begins, torch.zeros_like(x[:, 0]))


def begin_of_documents(documents: Documents | None, positions: Tensor, x: Tensor) -> Tensor:
    """Tokens since the begin of each token's document (B, P)."""
    return (positions if documents is None else documents.positions(positions)).expand(x.shape[:2])


def convolve(x: Tensor, before: Tensor, taps: Tensor, since: Tensor) -> Tensor:
    """Taps (WIDTH, C) over the tokens up to each one; none reaches into another document."""
    whole = torch.cat((before, x), 1)
    out = torch.zeros_like(x)
    for back in range(WIDTH):
        shifted = whole[:, WIDTH - 1 - back : WIDTH - 1 - back + x.shape[1]]
        out = out + taps[back] * shifted * (since >= back)[..., None]
    return out


def recur(x: Tensor, decay: Tensor, since: Tensor, state: Tensor) -> Tensor:
    """The states after each token (B, P, C); a document starts from none."""
    states = []
    for t in range(x.shape[1]):
        state = decay[:, t] * state * (since[:, t] > 0)[:, None] + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


class SplitRecurrence(SplitMixer):
    """``Mixer`` over ranks: what a package registers with its plan."""

    def forward(
        self, x: Tensor, decay: Tensor, taps: Tensor, documents: Documents | None = None
    ) -> Tensor:
        where = SplitPositions(Positions(), self.axis, self.split)(x.shape[1])
        since = begin_of_documents(documents, where, x)
        befores = halo(self.pieces(x), WIDTH - 1, self.axis, self.split)
        pieces = [
            (convolve(piece, before, taps, of), d, of)
            for piece, before, d, of in zip(
                self.pieces(x), befores, self.pieces(decay), self.pieces(since), strict=True
            )
        ]
        ends = torch.stack([recur(*piece, torch.zeros_like(x[:, 0]))[:, -1] for piece in pieces])
        kept = [(d * (of > 0)[..., None]).prod(1) for _, d, of in pieces]
        states = incoming(torch.stack(kept), ends, self.axis, self.split)
        return torch.cat([recur(*p, s) for p, s in zip(pieces, states, strict=True)], 1)


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, B, S, C, generator=generator, dtype=torch.float64)
    decay = torch.rand(B, S, C, generator=generator, dtype=torch.float64)
    taps = torch.randn(WIDTH, C, generator=generator, dtype=torch.float64)
    return [x, decay, taps, weight]


def starts() -> Tensor:
    bounds = [torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in LENGTHS]
    return torch.cat([starts_of_lengths(row, S) for row in bounds])


def whole(packed: bool) -> list[Tensor]:
    """Output and gradients of x, decay and taps in one process."""
    *inputs, weight = drawn()
    leaves = [x.requires_grad_() for x in inputs]
    out = Mixer()(*leaves, documents=Documents(starts()) if packed else None)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@dataclass
class Found:
    results: list[Tensor]
    sent: dict[tuple[str, str], tuple[int, float]]
    gathered: list[int]
    before: list[int]


def on_a_rank() -> dict[tuple, Found]:
    return {case: _mix(*case) for case in CASES}


def _mix(cp: int, split: Split, packed: bool) -> Found:
    topology = Topology(Layout(4, cp=cp))
    axis = topology.axis("cp")
    style = SplitContext(form=SplitRecurrence, split=split)
    mixer = style.apply(Mixer(), "mixer", ParameterTable(topology))
    x, decay, taps, weight = drawn()
    x, decay, weight = (take_held(t, axis, split) for t in (x, decay, weight))
    leaves = [t.clone().requires_grad_() for t in (x, decay, taps)]
    documents = Documents(take_held(starts(), axis, split)) if packed else None
    with CommLedger(topology) as ledger:
        out = mixer(*leaves, documents=documents)
        gradients = torch.autograd.grad((out * weight).sum(), leaves)
    numbers = torch.tensor(piece_numbers(axis, split))
    return Found(
        [out.detach(), *gradients],
        {key: (entry.calls, entry.bytes) for key, entry in ledger.entries.items()},
        gather_pieces(numbers + 1, axis, split).tolist(),
        from_before(numbers + 1, axis, split).tolist(),
    )


@pytest.fixture(scope="module")
def job() -> list[dict[tuple, Found]]:
    return launch(on_a_rank, 4, timeout=60)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_split_recurrence_equals_the_whole_one(job: list[dict], case: tuple) -> None:
    cp, split, packed = case
    out, dx, ddecay, dtaps = whole(packed)
    for rank, found in enumerate(job):
        pieces = [take_held(t, axis_of(rank, cp), split) for t in (out, dx, ddecay)]
        torch.testing.assert_close(found[case].results[:3], pieces, rtol=1e-12, atol=1e-13)
    for first in range(0, 4, cp):
        # Each rank has the part of its own tokens, as every parameter beside the mixer has.
        parts = [job[rank][case].results[3] for rank in range(first, first + cp)]
        torch.testing.assert_close(torch.stack(parts).sum(0), dtaps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_of_states_and_of_the_tokens_before(job: list[dict], case: tuple) -> None:
    cp, split, _ = case
    num_pieces = 2 if split == "zigzag" else 1
    states = (cp - 1) * num_pieces * 2 * B * C * 8
    tail = B * (WIDTH - 1) * C * 8
    for rank, found in enumerate(job):
        at = rank % cp
        mine = piece_numbers(axis_of(rank, cp), split)
        owners = {n: r for r in range(cp) for n in piece_numbers(axis_of(0, cp), split, r)}
        there = sum(owners.get(n + 1, at) != at for n in mine)
        back = sum(owners.get(n - 1, at) != at for n in mine)
        assert found[case].sent == {
            ("all_gather", "cp"): (1, states),
            ("reduce_scatter", "cp"): (1, states),
            ("all_to_all", "cp"): (2, (there + back) * tail),
        }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_in_order_and_those_before(job: list[dict], case: tuple) -> None:
    cp, split, _ = case
    count = cp * (2 if split == "zigzag" else 1)
    for rank, found in enumerate(job):
        assert found[case].gathered == list(range(1, count + 1))
        assert found[case].before == piece_numbers(axis_of(rank, cp), split)


@pytest.mark.parametrize("split", SPLITS)
def test_one_rank_has_the_whole_sequence(split: Split) -> None:
    alone = Axis("cp", 1, 0, (0,))
    assert piece_numbers(alone, split) == [0]
    *inputs, _ = drawn()
    mixer = SplitRecurrence(Mixer(), alone, split)
    torch.testing.assert_close(mixer(*inputs), Mixer()(*inputs), rtol=1e-13, atol=1e-13)
    topology = imagined(2, tp=2)[0]
    core = Mixer()
    style = SplitContext(form=SplitRecurrence, split=split)
    assert style.apply(core, "mixer", ParameterTable(topology)) is core


def test_pieces_shorter_than_what_they_hand_on_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 tokens before each piece .* cp=4, .* have 2; use"):
        halo([torch.zeros(B, 2, C)], 3, axis_of(0, 4), "contiguous")


def test_a_mixer_with_parameters_is_refused() -> None:
    style = SplitContext(form=SplitRecurrence)
    with pytest.raises(ConfigError, match=r"at 'm' wraps Linear, .* weight, bias; they belong to"):
        style.apply(nn.Linear(2, 2), "m", ParameterTable(imagined(2, cp=2)[0]))
