"""One forward pass weighs what is kept and what would be if layers were recomputed."""

import pytest
import torch

from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.recomputing import request_recomputation
from fivefold.parallel_core.regions import recompute
from fivefold.parallel_core.weighing import Weighing

from .gpt import B, S
from .gpt_stages import StagedGPT, V


@pytest.mark.parametrize("regions", ["none", "selective", "norms+mlp_activation"])
def test_both_numbers_are_the_ledgers(regions: str) -> None:
    model = StagedGPT(2)
    recompute(model, regions)
    recompute(model, "full", only_on_request=True)
    ids, targets = torch.randint(0, V, (2, B, S))
    expected = []
    for on in (False, True):
        with ActivationLedger(model) as ledger, request_recomputation(on):
            loss = model.loss(model(ids), targets)
            expected.append(ledger.live)
        del loss
    weighing = Weighing(model)
    with weighing:
        logits = model(ids)
    before = weighing.stored
    with weighing:
        loss = model.loss(logits, targets)
    assert 0 < before < weighing.stored
    assert [weighing.stored, weighing.recomputed] == expected
    weighing.let_go()
    loss.backward()
    assert [weighing.stored, weighing.recomputed] == expected


def test_what_is_there_anyway_is_left_out() -> None:
    model = StagedGPT(1)
    recompute(model, "full", only_on_request=True)
    x = torch.randn(B, S, 16, requires_grad=True)
    found = []
    for given in ([], [x, None, 3]):
        weighing = Weighing(model)
        weighing.leave_out(given)
        with weighing:
            model.layers["0"](x)
        found.append((weighing.stored, weighing.recomputed))
    nbytes = x.numel() * 4
    assert found[0][0] - found[1][0] == nbytes
    assert [recomputed for _, recomputed in found] == [nbytes, 0]
