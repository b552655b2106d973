"""Measurements by hand, a parent beside itself, and ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.compress.evaluate import Quality, batch_of, measure, ranked, run_layers
from fivefold.hybrid_ssm.compress.prune import pruned_layers, random_scores, whole
from fivefold.hybrid_ssm.compress.stream import Stream


def test_a_model_agrees_with_itself(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    ids = torch.arange(40).view(2, 20) * 3 % 257
    targets = (ids * 7 + 1) % 257
    targets[1, 5:] = -100
    with Stream(save(model)) as stream, torch.no_grad():
        batches = [batch_of((ids, targets), stream.config.pattern, stream.device)]
        layers = (stream.layer(index) for index in range(7))
        parent = run_layers(stream, layers, batches)
        scores = random_scores(stream.config, 0)
        child = run_layers(stream, pruned_layers(stream, whole(stream.config), scores), batches)
        found = measure(stream.tail().head, child, parent, batches)
        torch.testing.assert_close(stream.tail().head(parent[0]), model(ids), rtol=0, atol=0)
        logits, valid = model(ids), targets != -100
    assert (found.agreement, found.kl) == (1.0, 0.0)
    accuracy = (logits.argmax(-1) == targets)[valid].double().mean()
    assert found.accuracy == pytest.approx(float(accuracy))
    loss = torch.nn.functional.cross_entropy(logits.double()[valid], targets[valid])
    assert found.loss == pytest.approx(float(loss), rel=1e-6)


def test_documents_are_kept_apart(
    make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]
) -> None:
    model = make_model()
    ids = torch.arange(12).view(1, 12)
    starts = torch.tensor([[0] * 5 + [5] * 7])
    with Stream(save(model)) as stream, torch.no_grad():
        batch = batch_of((ids, ids, starts), stream.config.pattern, stream.device)
        layers = (stream.layer(index) for index in range(7))
        (hidden,) = run_layers(stream, layers, [batch])
        found = stream.tail().head(hidden)
        alone = torch.cat([model(ids[:, :5]), model(ids[:, 5:])], 1)
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-5)


def test_ranks_are_summed() -> None:
    def quality(accuracy: float, agreement: float, kl: float = 0.0) -> Quality:
        return Quality(accuracy, agreement, 0.0, kl)

    # Ranks 0+2, 1+0, 2+1: the second leads though the first is most accurate.
    assert ranked([quality(0.9, 0.1), quality(0.8, 0.9), quality(0.7, 0.5)]) == [1, 0, 2]
    # Equal sums: the lower divergence first.
    assert ranked([quality(0.9, 0.1, 2.0), quality(0.1, 0.9, 1.0)]) == [1, 0]
