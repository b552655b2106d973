"""The bytes that autograd keeps of a GPT block are the terms of arXiv 2205.05198, section 4."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core import Layout, Topology, launch, parallelize, recompute
from fivefold.parallel_core.activations import ActivationLedger

from .gpt import GPT, A, B, H, S, plan

SBH, AS2B = S * B * H, A * S * S * B
DTYPES = (torch.bfloat16, torch.float32)
MODES = ("none", "selective", "full")


def paper_terms(t: int, sequence: bool, mode: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one block under tensor size ``t``: table 2 of the paper, term by term."""
    e = dtype.itemsize  # the paper's 2; masks have 1 byte
    replicated = t if sequence else 1
    if mode == "full":
        return {"input": e * SBH // replicated}
    terms = {
        "attention_norm.input": e * SBH // replicated,
        "attention.qkv.input": e * SBH // replicated,
        "attention.core.q": e * SBH // t,
        "attention.core.k": e * SBH // t,
        "attention.core.v": e * SBH // t,
        "attention.core.softmax": e * AS2B // t,
        "attention.core.native_dropout": e * AS2B // t,
        "attention.core.native_dropout.1": AS2B // t,
        "attention.o_proj.input": e * SBH // t,
        "attention_dropout.native_dropout.1": SBH // replicated,
        "mlp_norm.input": e * SBH // replicated,
        "up.input": e * SBH // replicated,
        "activation.input": 4 * e * SBH // t,
        "down.input": 4 * e * SBH // t,
        "mlp_dropout.native_dropout.1": SBH // replicated,
    }
    if mode == "selective":
        inside = ("softmax", "native_dropout", "native_dropout.1")
        terms = {k: v for k, v in terms.items() if k.removeprefix("attention.core.") not in inside}
    # The paper leaves the norms' means and deviations out; autograd keeps them.
    rows = S * B // replicated
    for norm, number in product(("attention_norm", "mlp_norm"), (1, 2)):
        terms[f"{norm}.native_layer_norm.{number}"] = rows * e
    return terms


def measured(t: int) -> dict[tuple[bool, str, torch.dtype], dict[str, int]]:
    """Terms of one block for every combination, on this rank."""
    topology = Topology(Layout(t, tp=t)) if t > 1 else Topology.local()
    return {
        (sequence, mode, dtype): _terms(topology, sequence, mode, dtype)
        for sequence, mode, dtype in product((False, True), MODES, DTYPES)
    }


def _terms(topology: Topology, sequence: bool, mode: str, dtype: torch.dtype) -> dict[str, int]:
    model = GPT().to(dtype)
    parallelize(model, topology, plan(sequence))
    recompute(model, mode)
    length = S // topology.size("tp") if sequence else S
    x = torch.randn(B, length, H, dtype=dtype, requires_grad=True)
    with ActivationLedger(model) as ledger:
        y = model(x)
        terms = ledger.terms()
        assert sum(terms.values()) == ledger.live == ledger.peak
        y.sum().backward()
        assert ledger.live == 0
        assert ledger.terms() == {}
    return {name.removeprefix("layers.0."): nbytes for name, nbytes in terms.items()}


@pytest.mark.parametrize("t", [1, 2, 4])
def test_every_term_of_a_block_is_the_papers(t: int) -> None:
    ranks = launch(measured, t, t) if t > 1 else [measured(1)]
    for found in ranks:
        assert len(found) == 12
        for (sequence, mode, dtype), terms in found.items():
            assert terms == paper_terms(t, sequence, mode, dtype), (sequence, mode, dtype)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_the_sums_are_the_papers_equations(t: int) -> None:
    """Equations 1, 2 and 4, and table 2, from the terms that the test above holds autograd to."""
    ratio = 5 * A * S / H
    statistics = 4 * S * B * 2

    def total(sequence: bool, mode: str) -> float:
        terms = paper_terms(t, sequence, mode, torch.bfloat16)
        return sum(terms.values()) - (mode != "full") * statistics / (t if sequence else 1)

    assert total(False, "none") == SBH * (10 + 24 / t + ratio / t)
    assert total(True, "none") == SBH * (34 / t + ratio / t)
    assert total(False, "selective") == SBH * (10 + 24 / t)
    assert total(True, "selective") == 34 * SBH / t
    assert total(False, "full") == 2 * SBH


def test_peak_follows_what_backward_frees() -> None:
    model = GPT(num_layers=3)
    x = torch.randn(B, S, H, requires_grad=True)
    with ActivationLedger(model) as ledger:
        y = model(x)
        one = sum(paper_terms(1, False, "none", torch.float32).values())
        assert ledger.live == 3 * one
        y.sum().backward()
        assert (ledger.live, ledger.peak) == (0, 3 * one)
        model(x)  # its graph dies with it
        assert (ledger.live, ledger.peak) == (0, 3 * one)


def test_full_recompute_keeps_one_boundary_a_block() -> None:
    model = GPT(num_layers=3)
    recompute(model, "full")
    x = torch.randn(B, S, H, requires_grad=True)
    with ActivationLedger(model) as ledger:
        model(x).sum().backward()
    assert (ledger.live, ledger.peak) == (0, 3 * 4 * SBH)


def test_views_count_once_and_parameters_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.linear(x[:2].clone())[0] + x.t().sum() * x.view(-1)[0]

    x = torch.randn(4, 4, requires_grad=True)
    model = Twice()
    with ActivationLedger(model) as ledger:
        y = model(x)
    assert y.requires_grad
    names = ledger.terms()
    assert sum(names.values()) == ledger.live
    # x, its clone, the two products and the sum; no weight, no second view of x.
    assert ledger.live == 64 + 32 + 64 + 32 + 4


def test_report_lists_every_term() -> None:
    model = GPT()
    with ActivationLedger(model) as ledger:
        y = model(torch.randn(B, S, H, requires_grad=True))
        lines = ledger.report().splitlines()
    assert y.shape == (B, S, H)
    assert len(lines) == len(ledger.terms()) + 1
    assert lines[-1].split() == ["total", f"{ledger.live:,}"]
