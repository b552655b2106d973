"""A model, gradients for it and steps, the same for every optimizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BACKENDS = ("reference", "cpu", "triton")
# The interpreter is slow.
STEPS = {"reference": 20, "cpu": 20, "triton": 4}
# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: up to one of its units.
ROUNDING = {"reference": 0.0, "cpu": 0.0, "triton": 2**-7}
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.7, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights, a bias, a vector of no values, and one that never gets a gradient."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model.to(dtype)


def gradients(model: nn.Module, steps: int, scale: float = 1.0) -> Iterator[list[Tensor | None]]:
    """Random ones that any optimizer can be given, in float64."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        yield [
            None
            if name == "unused"
            else scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in model.named_parameters()
        ]


def put(model: nn.Module, grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    scale: float = 1.0,
    before: Callable[[], Any] = lambda: None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    for grads in gradients(model, steps, scale):
        put(model, grads)
        before()
        optimizer.step()
        after()


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], within: float = 0.0) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=within, atol=within)
