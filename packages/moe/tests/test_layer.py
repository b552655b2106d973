from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.moe import MoEConfig, MoELayer
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.losses import SideOutputs


def every_expert(layer: MoELayer, x: Tensor) -> Tensor:
    """Every token through every expert, weighted with zero where it was not sent."""
    weights, chosen = layer.router(x)
    gates = x.new_zeros(len(weights), layer.router.weight.shape[0]).scatter(1, chosen, weights)
    return torch.einsum("te,eth->th", gates, each_expert(layer, x)).view_as(x)


def each_expert(layer: MoELayer, x: Tensor) -> Tensor:
    """What every expert makes of every token."""
    gate, up = torch.einsum("th,eifh->ietf", x.flatten(0, 1), layer.experts.gate_up).unbind()
    return torch.einsum("etf,ehf->eth", F.silu(gate) * up, layer.experts.down)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_against_every_expert(tiny: Callable[..., MoEConfig], k: int) -> None:
    layer = MoELayer(tiny(num_experts_per_token=k)).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), every_expert(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    inputs, grad = (x, *layer.parameters()), torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(
        found, torch.autograd.grad(wanted, inputs, grad), rtol=1e-10, atol=1e-12
    )


def test_dropped_copies_add_nothing(tiny: Callable[..., MoEConfig]) -> None:
    capacity = CapacityConfig(factor=0.5)
    layer = MoELayer(tiny(capacity=capacity), 3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    weights, chosen = layer.router(x)
    kept = layer.capacity(chosen.view(2, 6, 2), weights.view(2, 6, 2)).view(12, 2)
    assert 0 < int(layer.side.totals["dropped.3"]) == int((~kept).sum())
    gates = x.new_zeros(12, 5).scatter(1, chosen, weights * kept)
    wanted = torch.einsum("te,eth->th", gates, each_expert(layer, x)).view_as(x)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    inputs, grad = (x, *layer.parameters()), torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(
        found, torch.autograd.grad(wanted, inputs, grad), rtol=1e-10, atol=1e-12
    )
    whole = every_expert(layer.eval(), x)
    torch.testing.assert_close(layer(x), whole, rtol=1e-11, atol=1e-12)  # only training drops


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_padding_changes_nothing(tiny: Callable[..., MoEConfig], factor: float) -> None:
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    outs = []
    for pad in (False, True):
        torch.manual_seed(3)
        config = tiny(capacity=CapacityConfig(factor=factor, pad=pad), initializer_range=0.5)
        layer = MoELayer(config).double()
        out = layer(x)
        out.square().sum().backward()
        outs.append([out, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)


def test_shared_expert(tiny: Callable[..., MoEConfig]) -> None:
    config = tiny(
        model_type="qwen2_moe",
        shared_intermediate_size=12,
        shared_gate=True,
        initializer_range=0.4,
    )
    layer = MoELayer(config).double().eval()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    shared, gate = layer.shared, layer.shared_gate
    assert shared is not None and gate is not None
    a, b = (linear(x) for linear in shared.gate_up.children())
    wanted = every_expert(layer, x) + gate(x).sigmoid() * shared.down(F.silu(a) * b)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_losses_go_to_the_given_side(tiny: Callable[..., MoEConfig]) -> None:
    side = SideOutputs()
    layer = MoELayer(tiny(router=RouterConfig(z_loss_coef=0.1)), 7, side)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(1, 4, 32))
    assert set(side.totals) == {"load.7", "aux_loss", "z_loss"}


def test_starts_from_weights_of_the_configuration(tiny: Callable[..., MoEConfig]) -> None:
    torch.manual_seed(5)
    layer = MoELayer(tiny(initializer_range=0.1))
    first = [parameter.detach().clone() for parameter in layer.parameters()]
    assert len(first) == 3 and all(0.085 < value.std() < 0.115 for value in first)
    torch.manual_seed(5)
    layer.reset_parameters()
    assert all(map(torch.equal, layer.parameters(), first))
