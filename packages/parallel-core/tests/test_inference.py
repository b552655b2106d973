"""Logits of a model that is laid over ranks equal those of the whole model, on every rank."""

import pytest
import torch

from fivefold.parallel_core.build import build
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.inference import whole_logits
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

from .imagined import imagined
from .rig import SEED, batch, plain_model
from .toy import HEAD, TAIL, Toy, ToyConfig, plan, rule

CONFIG = ToyConfig(num_experts=4, num_layers=3)
DEGREES = [{"tp": 2, "pp": 2}, {"tp": 2, "cp": 2, "ep": 4}, {"pp": 2, "ep": 2}, {}]


@pytest.fixture(scope="module")
def errors() -> list[list[float]]:
    """For every layout the largest error on each of 4 ranks."""
    ids, _ = batch(CONFIG.vocab_size)
    with torch.no_grad():
        wanted = plain_model(CONFIG)(ids)

    def on_a_rank() -> list[float]:
        found = []
        for degrees in DEGREES:
            topology = Topology(Layout(4, **degrees))
            model = build(
                lambda: Toy(CONFIG),
                topology,
                plan(CONFIG),
                head=HEAD,
                tail=TAIL,
                dtype=torch.float64,
            )
            model.initialise(rule, SEED)
            logits = whole_logits(
                model.parts[0],
                topology,
                ids,
                vocab_size=CONFIG.vocab_size,
                hidden_size=CONFIG.hidden_size,
            )
            assert logits.shape == wanted.shape
            assert not logits.requires_grad
            found.append((logits - wanted).abs().max().item())
        return found

    return [list(ranks) for ranks in zip(*launch(on_a_rank, 4, timeout=300), strict=True)]


@pytest.mark.parametrize("index", range(len(DEGREES)), ids=map(str, DEGREES))
def test_logits_are_those_of_the_whole_model(errors: list[list[float]], index: int) -> None:
    assert max(errors[index]) < 1e-12


def test_a_sequence_that_does_not_divide_is_refused_with_the_numbers() -> None:
    topology = imagined(4, tp=2, cp=2)[0]
    with pytest.raises(ConfigError, match=r"sequences of 6 tokens .* tp\*cp = 4; pad"):
        ids = torch.zeros(1, 6, dtype=torch.int64)
        whole_logits(Toy(CONFIG), topology, ids, vocab_size=37, hidden_size=12)
