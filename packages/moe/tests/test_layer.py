from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.moe import MoEConfig, MoELayer
from fivefold.moe.routing import RouterConfig
from fivefold.parallel_core.losses import SideOutputs


def every_expert(layer: MoELayer, x: Tensor) -> Tensor:
    """Every token through every expert, weighted with zero where it was not sent."""
    weights, chosen = layer.router(x)
    gates = x.new_zeros(len(weights), layer.router.weight.shape[0]).scatter(1, chosen, weights)
    rows = x.flatten(0, 1)
    gate, up = torch.einsum("th,eifh->ietf", rows, layer.experts.gate_up).unbind()
    out = torch.einsum("etf,ehf->eth", F.silu(gate) * up, layer.experts.down)
    return torch.einsum("te,eth->th", gates, out).view_as(x)


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
