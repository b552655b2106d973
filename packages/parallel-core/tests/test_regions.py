"""Recomputed regions: bitwise what they were, and counted once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import GraphExecGroup

from fivefold.parallel_core import ConfigError, Layout, Topology, launch, parallelize, recompute
from fivefold.parallel_core.activations import ActivationLedger
from fivefold.parallel_core.losses import SideOutputs
from fivefold.parallel_core.recomputing import (
    is_recomputing,
    is_requested,
    recomputation,
    request_recomputation,
)
from fivefold.parallel_core.regions import check_regions, on_request

from .gpt import GPT, B, H, S, plan

CHOICES = [
    "selective",
    "full",
    ["mlp_activation"],
    ["norms", "attention_core", "mlp_activation"],
    "norms+mlp_activation",
]


def step(model: nn.Module, length: int = S) -> list[Tensor]:
    """Output and every gradient, from fixed random numbers; dropout draws in between."""
    torch.manual_seed(3)
    x = torch.randn(B, length, H, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, torch.rand(1), *gradients]


@pytest.mark.parametrize("regions", CHOICES, ids=str)
def test_bitwise_equal_with_dropout_and_the_random_numbers_after_it(regions: Any) -> None:
    model = GPT(num_layers=2)
    names = [name for name, _ in model.named_parameters()]
    expected = step(model)
    recompute(model, regions)
    found = step(model)
    assert len(found) == len(expected) == 3 + len(names)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [name for name, _ in model.named_parameters()] == names
    again = step(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def _on_ranks(regions: Any, sequence: bool) -> bool:
    topology = Topology(Layout(2, tp=2))
    model = GPT(num_layers=2)
    parallelize(model, topology, plan(sequence))
    length = S // 2 if sequence else S
    expected = step(model, length)
    recompute(model, regions)
    return all(torch.equal(a, b) for a, b in zip(step(model, length), expected, strict=True))


@pytest.mark.parametrize("sequence", [False, True])
def test_bitwise_equal_under_tensor_parallelism(sequence: bool) -> None:
    for regions in ("selective", "full"):
        assert launch(_on_ranks, 2, regions, sequence) == [True, True]


def test_none_and_twice_change_nothing() -> None:
    model = GPT()
    recompute(model, "none")
    assert (
        type(model.layers[0].attention.core).__mro__ == type(GPT().layers[0].attention.core).__mro__
    )
    recompute(model, "selective")
    once = type(model.layers[0].attention.core)
    recompute(model, "selective")
    assert type(model.layers[0].attention.core) is once
    assert once.__name__ == "Core"


class Counting(nn.Module):
    """Adds a side loss and counts its own calls."""

    def __init__(self, side: SideOutputs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.side, self.calls, self.repeated = side, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.repeated += is_recomputing()
        y = (x * self.weight).tanh()
        return self.side.loss("square", y.square().sum(), y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recompute_regions = {"layer": "layers.*", "attention_core": "nowhere"}
        self.side = SideOutputs()
        self.layers = nn.ModuleList(Counting(self.side) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_side_outputs_count_once_and_keep_their_gradient() -> None:
    plain, net = Net(), Net()
    recompute(net, "full")
    for model in (plain, net):
        model(torch.ones(3)).sum().backward()
    assert [(layer.calls, layer.repeated) for layer in net.layers] == [(2, 1), (2, 1)]
    assert torch.equal(net.side.drain()["square"], plain.side.drain()["square"])
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_no_gradients_no_repetition() -> None:
    net = Net()
    recompute(net, "full")
    with torch.no_grad():
        net(torch.ones(3))
    assert [layer.calls for layer in net.layers] == [1, 1]


def test_is_recomputing_only_inside() -> None:
    assert not is_recomputing()
    again = recomputation()
    for _ in range(2):
        with again, recomputation(), again:
            assert is_recomputing()
        assert not is_recomputing()


@pytest.mark.parametrize("inner", ["none", "selective"])
def test_what_is_recomputed_on_request_is_so_where_it_was_asked_for(inner: str) -> None:
    plain, model = GPT(num_layers=2), GPT(num_layers=2)
    model.load_state_dict(plain.state_dict())
    recompute(model, inner)
    recompute(model, "full", only_on_request=True)
    recompute(model, "full", only_on_request=True)
    assert list(on_request(model)) == list(model.layers)
    expected, kept = step(plain), []
    for on in (False, True):
        x = torch.randn(B, S, H, requires_grad=True)
        with ActivationLedger(model) as ledger, request_recomputation(on):
            assert is_requested() == on
            y = model(x)
            kept.append(ledger.live)
        y.sum().backward()  # asks for nothing: the forward pass decided
        model.zero_grad()
        with request_recomputation(on):
            found = step(model)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not is_requested()
    assert kept[1] == 2 * B * S * H * 4 < kept[0]


@pytest.mark.parametrize("regions", ["full", "norms"])
def test_a_backward_in_two_parts_recomputes_once_in_each(regions: str) -> None:
    """As the pipeline schedules of zero bubble have it: inputs first, weights later."""
    found = []
    for mode in ("none", regions):
        torch.manual_seed(0)
        model = GPT()
        recompute(model, mode)
        calls = []
        model.layers[0].mlp_norm.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        x = torch.randn(B, S, H, requires_grad=True)
        y = model(x).clone()
        grads, groups = stage_backward_input([y], [torch.ones_like(y)], [x], model.parameters())
        with GraphExecGroup():
            stage_backward_weight(model.parameters(), groups)
        found.append([*grads, *(p.grad for p in model.parameters())])
        if mode == "full":
            assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("first", [False, True])
def test_a_region_is_recomputed_in_one_way(first: bool) -> None:
    model = GPT()
    recompute(model, "full", only_on_request=first)
    ways = ["always", "on request"]
    with pytest.raises(
        ConfigError, match=f"layers.0 cannot be recomputed {ways[not first]}; it is {ways[first]}"
    ):
        recompute(model, "full", only_on_request=not first)


@pytest.mark.parametrize(
    ("model", "regions", "message"),
    [
        (
            GPT,
            "most",
            r"GPT has no region 'most' to .* modes none, selective, full and its regions",
        ),
        (
            GPT,
            ["mlp", "norms"],
            r"GPT has no region 'mlp' to recompute; .* regions attention_core, m",
        ),
        (GPT, "norms+mlp", r"GPT has no region 'mlp' to recompute"),
        (nn.Identity, "selective", r"no region 'attention_core' to .* its regions \(none\)"),
        (
            GPT,
            ["layer", "norms"],
            r"layers.0.mlp_norm lies inside layers.0, which is recomputed as",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_said(model: Any, regions: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recompute(model(), regions)


def test_a_region_without_modules_is_found_on_the_whole_model() -> None:
    check_regions(GPT(), ["norms"])
    with pytest.raises(ConfigError, match=r"'attention_core' of Net is 'nowhere', which names no"):
        check_regions(Net(), "selective")
    recompute(Net(), "selective")  # a pipeline stage may lack them
