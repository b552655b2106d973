"""The planner's terms are what autograd really keeps of the paper's block, on random shapes."""

import random
from itertools import product

import pytest
import torch

from fivefold.parallel_core import Layout, Topology, launch, parallelize, recompute
from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.planner.activations import layer_terms
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.setup import Recompute

from .. import gpt

MODES: tuple[Recompute, ...] = ("none", "selective", "full")
Shape = tuple[int, int, int, int]
Key = tuple[Shape, bool, Recompute, int]


def shapes(count: int) -> list[Shape]:
    """(microbatch, length, hidden, heads) at random."""
    chance = random.Random(5)
    found = []
    for _ in range(count):
        heads = 4 * chance.randint(1, 3)
        # A head of one feature has the same bytes, which torch then books under another name.
        hidden = heads * chance.randint(2, 5)
        found.append((chance.randint(1, 3), 4 * chance.randint(1, 5), hidden, heads))
    return found


def planned(key: Key, t: int) -> dict[str, int]:
    (microbatch, length, hidden, heads), sequence, mode, size = key
    model = ModelShape(
        name="gpt",
        hidden=hidden,
        num_layers=1,
        num_heads=heads,
        vocabulary=8,
        norm_vectors=2,
        dropout=True,
        fused_attention=False,
    )
    local = Local(
        microbatch=microbatch,
        length=length,
        tp=t,
        cp=1,
        ep=1,
        etp=1,
        sequence=sequence,
        element_size=size,
        recompute=mode,
        imbalance=1.0,
    )
    return layer_terms(model, local, "T")


def measured(t: int, cases: list[Shape]) -> dict[Key, dict[str, int]]:
    topology = Topology(Layout(t, tp=t)) if t > 1 else Topology.local()
    found = {}
    for shape, sequence, mode, dtype in product(
        cases, (False, True), MODES, (torch.bfloat16, torch.float32)
    ):
        # The test's block reads its sizes where it is built; a rank is a process of its own.
        gpt.B, gpt.S, gpt.H, gpt.A = shape
        model = gpt.GPT().to(dtype)
        parallelize(model, topology, gpt.plan(sequence))
        recompute(model, mode)
        length = gpt.S // t if sequence else gpt.S
        x = torch.randn(gpt.B, length, gpt.H, dtype=dtype, requires_grad=True)
        with ActivationLedger(model) as ledger:
            y = model(x)
            terms = {k.removeprefix("layers.0."): v for k, v in ledger.terms().items()}
            assert y.requires_grad
        found[shape, sequence, mode, dtype.itemsize] = terms
    return found


@pytest.mark.parametrize("t", [1, 2, 4])
def test_every_term_is_the_ledgers(t: int) -> None:
    cases = shapes(6)
    for found in launch(measured, t, t, cases):
        assert len(found) == 12 * len(cases)
        for key, terms in found.items():
            assert terms == planned(key, t), key
