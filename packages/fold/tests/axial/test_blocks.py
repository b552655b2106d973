"""Exchanges are under way while a block works on the other representation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from axial_job import network
from torch import Tensor, nn

from fivefold.fold.model.blocks import EvoformerBlock, Masks
from fivefold.fold.sharding import AxialBlock
from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.exchange import Journey
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.topology import Topology

S, N, C_M, C_Z = 4, 6, 8, 6

BIAS, PAIRS_TO_ROWS, MSA_TO_COLUMNS, OUTER, MSA_TO_ROWS = range(5)
"""Exchanges, in the order in which they set out."""


def _watch(block: nn.Module, notes: list[str]) -> None:
    """Write down when modules begin and end."""
    for name in ("msa_row_attention.attention.linear_qkvg", "msa_transition", "pair"):
        module = block.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, n=name: notes.append(f"{n} begins"))
        module.register_forward_hook(lambda *_, n=name: notes.append(f"{n} ends"))


def _watch_journeys(notes: list[str]) -> None:
    """Write down when exchanges set out and arrive, by their number."""
    numbers: dict[int, int] = {}
    kept: list[Journey] = []

    def noted(once: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(self: Journey, *args: Tensor, back: bool = False) -> Any:
            kept.append(self)
            number = numbers.setdefault(id(self), len(numbers))
            notes.append(f"{number} {what}{' back' if back else ''}")
            return once(self, *args, **({"back": True} if back else {}))

        return run

    Journey.set_out = noted(Journey.set_out, "sets out")
    Journey.arrive = noted(Journey.arrive, "arrives")


def _notes() -> tuple[list[str], list[str]]:
    topology, notes = Topology(Layout(2, tp=2)), []
    block = EvoformerBlock(network().evoformer, C_M, C_Z, is_extra=False)
    block = AxialBlock().apply(block, "block", ParameterTable(topology))
    _watch(block, notes)
    _watch_journeys(notes)
    m = torch.randn(S // 2, N, C_M, requires_grad=True)
    z = torch.randn(N, N // 2, C_Z, requires_grad=True)
    m, z = block(m, z, Masks.of(torch.ones(S, N), torch.ones(N, N)))
    forward = notes.copy()
    (m.sum() + z.sum()).backward()
    return forward, notes[len(forward) :]


@pytest.fixture(scope="module")
def notes() -> list[tuple[list[str], list[str]]]:
    return launch(_notes, 2, timeout=60)


@pytest.mark.parametrize(
    ("exchange", "work"),
    [
        (BIAS, "msa_row_attention.attention.linear_qkvg"),
        (PAIRS_TO_ROWS, "msa_transition"),
        (MSA_TO_ROWS, "pair"),
    ],
)
def test_there_is_work_between_the_halves(
    notes: list[tuple[list[str], list[str]]], exchange: int, work: str
) -> None:
    for forward, _ in notes:
        places = [f"{exchange} sets out", f"{work} begins", f"{work} ends", f"{exchange} arrives"]
        found = [forward.index(each) for each in places]
        assert found == sorted(found)


def test_gradients_of_the_msa_travel_while_those_of_pairs_are_computed(
    notes: list[tuple[list[str], list[str]]],
) -> None:
    for forward, backward in notes:
        num_exchanges = sum(note.endswith("sets out") for note in forward)
        assert num_exchanges == sum(note.endswith("sets out back") for note in backward) == 11
        begins, ends = (
            backward.index(f"{MSA_TO_ROWS} {what}") for what in ("sets out back", "arrives")
        )
        between = {note.split()[0] for note in backward[begins + 1 : ends]}
        # All six exchanges of the pairs go back in between.
        assert between >= {str(number) for number in range(MSA_TO_ROWS + 1, 11)}


def _kept() -> int:
    """Bytes that one rank keeps of a block for its backward pass."""
    size = dist.get_world_size()
    topology = Topology(Layout(size, tp=size))
    block = EvoformerBlock(network().evoformer, C_M, C_Z, is_extra=False)
    block = AxialBlock().apply(block, "block", ParameterTable(topology))
    m = torch.randn(16 // size, 24, C_M, requires_grad=True)
    z = torch.randn(24, 24 // size, C_Z, requires_grad=True)
    masks = Masks.of(torch.ones(16, 24), torch.ones(24, 24))
    with ActivationLedger(block) as ledger:
        outputs = block(m, z, masks)
        kept = ledger.live
    del outputs
    return kept


def test_ranks_keep_less_the_more_they_are() -> None:
    alone, pair, four = (max(launch(_kept, size, timeout=60)) for size in (1, 2, 4))
    # What is gathered stays whole on all of them.
    assert pair < 0.6 * alone
    assert four < 0.4 * alone
