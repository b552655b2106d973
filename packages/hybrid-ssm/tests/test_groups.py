"""A group of channels over several ranks; whole models are held to the law in ``test_sharding``."""

import pytest
import torch
from torch import Tensor

from fivefold.hybrid_ssm.groups import HeadsParallel, SharedGroupNorm
from fivefold.hybrid_ssm.norm import GatedNorm
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.topology import Topology

WIDTH = 24


def norm_of(num_groups: int) -> GatedNorm:
    torch.manual_seed(4)
    norm = GatedNorm(WIDTH, num_groups, eps=0.1).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    y, gate = torch.randn(2, 3, 5, WIDTH, generator=generator, dtype=torch.float64)
    return y.requires_grad_(), gate.requires_grad_()


def outcome(norm: torch.nn.Module, y: Tensor, gate: Tensor) -> list[Tensor]:
    """Result and gradients, with gradients of the result that differ everywhere."""
    out = norm(y, gate)
    out.backward(out.detach().sin() + 0.3)
    return [out.detach(), y.grad, gate.grad, norm.get_parameter("weight").grad]


def of_rank(num_groups: int) -> list[Tensor]:
    topology = Topology(Layout(4, tp=4))
    axis = topology.axis("tp")
    table = ParameterTable(topology)
    norm = HeadsParallel(num_groups).apply(norm_of(num_groups), "norm", table)
    assert isinstance(norm, SharedGroupNorm) == (num_groups < 4)
    assert table["norm.weight"].sharded == ((0, "tp"),)
    y, gate = (x.detach().chunk(4, -1)[axis.rank].requires_grad_() for x in inputs())
    return outcome(norm, y, gate)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_ranks_normalise_a_group_together(num_groups: int) -> None:
    whole = outcome(norm_of(num_groups), *inputs())
    found = [
        torch.cat(parts, dim=-1) for parts in zip(*launch(of_rank, 4, num_groups), strict=True)
    ]
    for ours, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def refused(num_groups: int) -> str:
    table = ParameterTable(Topology(Layout(2, tp=2)))
    with pytest.raises(ConfigError) as caught:
        HeadsParallel(num_groups).apply(norm_of(num_groups), "norm", table)
    return str(caught.value)


def test_groups_that_fit_no_ranks_are_refused() -> None:
    assert "norm of 3 heads cannot be split over tp of 2 ranks" in launch(refused, 2, 3)[0]
