import pytest
import torch
from torch import nn

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.errors import MoEInputError
from fivefold.moe.replay import record_routing, replay_routing
from fivefold.parallel_core import recompute


@pytest.fixture
def model(tiny: object) -> MoEForCausalLM:
    config: MoEConfig = tiny(dense_layers=(1,), intermediate_size=8, num_layers=3)  # type: ignore[operator]
    return MoEForCausalLM(config)


@pytest.fixture
def tiny(tiny: object) -> object:
    def make(**changes: object) -> MoEConfig:
        qwen = {"model_type": "qwen3_moe", "qk_norm": True}
        return tiny(**(qwen | changes))  # type: ignore[operator]

    return make


def test_a_recorded_routing_is_repeated_by_other_weights(model: MoEForCausalLM) -> None:
    ids = torch.randint(0, 48, (2, 6))
    with record_routing(model) as record:
        model(ids)
        model(ids[:1])
    assert sorted(record.choices) == [0, 2]
    assert [tuple(c.shape) for c in record.choices[0]] == [(2, 6, 2), (1, 6, 2)]
    for layer in (0, 2):
        nn.init.normal_(model.layers[str(layer)].mlp.router.weight)
    with record_routing(model) as other:
        model(ids)
    assert not torch.equal(other.choices[0][0], record.choices[0][0])
    with replay_routing(model, record.choices):
        repeated = model(ids)
        model(ids[:1])
    # The choices are the record's, the weights and their gradients the model's own.
    repeated.sum().backward()
    assert model.layers["0"].mlp.router.weight.grad.abs().sum() > 0
    assert not torch.equal(repeated, model(ids))
    assert all(model.layers[str(layer)].mlp.router.record is None for layer in (0, 2))


def test_replaying_its_own_choices_changes_nothing(model: MoEForCausalLM) -> None:
    ids = torch.randint(0, 48, (2, 6))
    with record_routing(model) as record:
        first = model(ids)
    with replay_routing(model, record.choices):
        assert torch.equal(model(ids), first)


def test_recomputation_neither_adds_nor_skips(model: MoEForCausalLM) -> None:
    recompute(model, "full")
    ids = torch.randint(0, 48, (2, 6))
    with record_routing(model) as record:
        a, b = model(ids), model(ids[:1])
        a.sum().backward()
        b.sum().backward()
    assert [len(calls) for calls in record.choices.values()] == [2, 2]
    grad = model.layers["0"].mlp.router.weight.grad.clone()
    model.zero_grad()
    with replay_routing(model, record.choices):
        a, b = model(ids), model(ids[:1])
        a.sum().backward()
        b.sum().backward()
    assert torch.equal(model.layers["0"].mlp.router.weight.grad, grad)


def test_a_record_that_does_not_fit_is_named(model: MoEForCausalLM) -> None:
    with record_routing(model) as record:
        model(torch.randint(0, 48, (2, 6)))
    with replay_routing(model, record.choices):
        with pytest.raises(MoEInputError, match=r"call 0 of layer 0 in the record is \(2, 6, 2\)"):
            model(torch.randint(0, 48, (2, 5)))
        model(torch.randint(0, 48, (2, 6)))
        with pytest.raises(MoEInputError, match=r"layer 0 routes for the 2\. time, but the record"):
            model(torch.randint(0, 48, (2, 6)))
    with (
        pytest.raises(MoEInputError, match="Linear has no router to record"),
        record_routing(nn.Linear(1, 1)),
    ):
        pass
