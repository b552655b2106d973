"""Modules that keep the stored dtype where the rest computes in another, and weighed gradients."""

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.data_parallel import Precision, add_gradients, reduce_gradients
from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.errors import ConfigError, RankError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.plan import parallelize
from fivefold.parallel_core.precision import exact_names
from fivefold.parallel_core.styles import Replicate
from fivefold.parallel_core.topology import Topology

HALF = Precision(compute="bfloat16")


class Mixed(nn.Module):
    """Two layers, the second of which needs all digits."""

    full_precision = ("head", "no.such.*")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x.to(self.trunk.weight.dtype)).float())


def step(form: Form) -> tuple[dict[str, torch.dtype], dict[str, Tensor], dict[str, Tensor]]:
    """Dtypes, the reduced gradients, and what they should be, of two samples a rank."""
    world = 2
    topology, model = Topology(Layout(world)), Mixed()
    data = DataParallelConfig(form=form)
    plan = {"*": Replicate(sequence=False)}
    table = parallelize(model, topology, plan, HALF, data_parallel=data)
    parameters = dict(model.named_parameters())
    for number in range(2):
        x = torch.full((5, 3), 1.0 + topology.world_rank + 2 * number)
        grads = torch.autograd.grad(model(x).sum(), list(parameters.values()))
        add_gradients(model, dict(zip(parameters, grads, strict=True)), 0.5 + number)
    reduce_gradients(model)
    dtypes = {name: p.dtype for name, p in parameters.items()}
    found = {piece.name: piece.grad for piece in table.pieces(model) if piece.grad is not None}
    plain = Mixed()
    total = sum(
        (0.5 + n) * plain(torch.full((5, 3), 1.0 + rank + 2 * n)).sum()
        for n in range(2)
        for rank in range(world)
    )
    total.backward()
    return dtypes, found, {name: p.grad for name, p in plain.named_parameters()}


def test_named_modules_keep_the_stored_dtype_and_gradients_are_weighed_in_it() -> None:
    for dtypes, found, expected in launch(step, 2, "replicate"):
        assert dtypes["trunk.weight"] == torch.bfloat16
        assert dtypes["head.weight"] == torch.float32
        for name, grad in expected.items():
            assert found[name].dtype == torch.float32
            # bfloat16 has 8 bits; what is summed afterwards loses nothing more.
            torch.testing.assert_close(found[name], grad, rtol=1e-2, atol=1e-2)


def test_names_are_those_of_parameters_below_the_patterns() -> None:
    assert exact_names(Mixed()) == {"head.weight", "head.bias"}
    assert exact_names(nn.Linear(2, 2)) == set()


def test_forms_with_one_dtype_are_refused() -> None:
    with pytest.raises(RankError, match="'zero2' computes with one dtype") as caught:
        launch(step, 2, "zero2")
    assert "ConfigError" in str(caught.value) or isinstance(caught.value.__cause__, ConfigError)


def test_a_weighed_gradient_lies_as_its_parameter() -> None:
    model = nn.Linear(3, 2)
    transposed = torch.randn(3, 2).T
    add_gradients(model, {"weight": transposed}, 0.5)
    assert model.weight.grad is not None
    assert model.weight.grad.stride() == model.weight.stride()
    add_gradients(model, {"weight": transposed}, 0.25)
    torch.testing.assert_close(model.weight.grad, 0.75 * transposed)
