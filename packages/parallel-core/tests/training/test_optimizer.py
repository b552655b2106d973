"""AdamW on pieces; that layouts do not change it is in test_plan and test_checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.checkpoint import Checkpoints, load_parts
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.parameters import ParameterTable, Piece, Placement
from fivefold.parallel_core.training.optimizer import (
    TORCH_ADAMW,
    AdamWConfig,
    ShardedAdamW,
    decays,
    part_of,
)

from ..imagined import imagined

CONFIG = AdamWConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


def model() -> nn.Module:
    """A matrix, a stack of matrices, a bias and a norm, in float64."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    module.stack = nn.Parameter(torch.randn(2, 3, 2, dtype=torch.float64))
    return module


def pieces_of(module: nn.Module) -> list[Piece]:
    return ParameterTable.of(module).pieces(module)


def set_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def adamw_by_hand(
    values: Tensor, gradients: list[Tensor], rates: list[float], weight_decay: float
) -> Tensor:
    """The formulas of the paper (algorithm 2), one tensor."""
    (beta1, beta2), eps = CONFIG.betas, CONFIG.eps
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        direction = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        values = values - rate * (direction + weight_decay * values)
    return values


def test_updates_are_those_of_the_paper_with_a_rate_for_each_step() -> None:
    module = model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    rates = [0.1, 0.01, 0.05]
    for step, rate in enumerate(rates):
        set_gradients(module, step)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
        optimizer.step(rate)
    for name, parameter in module.named_parameters():
        weight_decay = CONFIG.weight_decay if parameter.dim() > 1 else 0.0
        wanted = adamw_by_hand(before[name], gradients[name], rates, weight_decay)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-14)


def test_matrices_decay_and_vectors_do_not() -> None:
    assert {piece.name: decays(piece) for piece in pieces_of(model())} == {
        "stack": True,
        "0.weight": True,
        "0.bias": False,
        "1.weight": False,
        "1.bias": False,
    }


def test_a_step_frees_the_gradients() -> None:
    module = model()
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    set_gradients(module, 0)
    optimizer.step(0.1)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_parameter_without_gradient_stays() -> None:
    module = model()
    before = module[0].weight.detach().clone()
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    set_gradients(module, 0)
    module[0].weight.grad = None
    optimizer.step(0.1)
    assert torch.equal(module[0].weight, before)


def test_an_empty_piece_has_no_state() -> None:
    module = nn.ParameterList([torch.ones(2, 2), torch.ones(0, 2)])
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    assert set(optimizer.parts()) == {"exp_avg.0", "exp_avg_sq.0"}


def test_a_rank_that_holds_nothing_steps_and_has_no_state() -> None:
    module = nn.ParameterList([torch.ones(0, 2), torch.ones(0)])
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    optimizer.step(0.1)
    assert optimizer.parts() == {}


def test_another_optimizer_can_be_asked_for() -> None:
    made = []

    def make(params: Sequence[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        made.append(([group["weight_decay"] for group in params], options))
        return torch.optim.AdamW(params, **options, foreach=True)

    ours, theirs = model(), model()
    for module, kind in ((ours, make), (theirs, TORCH_ADAMW)):
        optimizer = ShardedAdamW(pieces_of(module), CONFIG, kind)
        for step in range(2):
            set_gradients(module, step)
            optimizer.step(0.1)
    assert made == [([0.3, 0.0], {"lr": 0.0, "betas": (0.8, 0.9), "eps": 1e-6})]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=0)


def test_parts_are_both_moments_by_name() -> None:
    module = model()
    optimizer = ShardedAdamW(pieces_of(module), CONFIG)
    set_gradients(module, 0)
    gradient = module[0].weight.grad
    assert gradient is not None
    gradient = gradient.clone()
    optimizer.step(0.1)
    parts = optimizer.parts()
    names = [name for name, _ in module.named_parameters()]
    assert set(parts) == {f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in names}
    torch.testing.assert_close(parts["exp_avg.0.weight"].tensor, gradient * 0.2)
    torch.testing.assert_close(parts["exp_avg_sq.0.weight"].tensor, gradient**2 * 0.1)
    assert parts["exp_avg.0.weight"].shape == (4, 3)


def test_the_part_of_a_padded_piece_leaves_the_padding_out() -> None:
    last = imagined(4, tp=4)[3]
    module, table = nn.Module(), ParameterTable(last)
    module.w = nn.Parameter(torch.ones(2, 3))
    table.add("w", Placement(shape=(7, 3), sharded=((0, "tp"),)))
    (piece,) = table.pieces(module)
    part = part_of(piece, torch.arange(6.0).view(2, 3))
    assert (part.box.offset, part.box.size, part.shape) == ((6, 0), (1, 3), (7, 3))
    assert part.tensor.tolist() == [[0, 1, 2]]


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    unbroken, first = model(), model()
    optimizer = ShardedAdamW(pieces_of(unbroken), CONFIG)
    for step in range(5):
        set_gradients(unbroken, step)
        optimizer.step(0.1)

    def parts(module: nn.Module, optimizer: ShardedAdamW) -> dict[str, object]:
        return {p.name: part_of(p, p.local) for p in pieces_of(module)} | optimizer.parts()

    optimizer = ShardedAdamW(pieces_of(first), CONFIG)
    for step in range(3):
        set_gradients(first, step)
        optimizer.step(0.1)
    path = Checkpoints(tmp_path).save(3, parts(first, optimizer), {})
    resumed = model()
    optimizer = ShardedAdamW(pieces_of(resumed), CONFIG)
    load_parts(path, parts(resumed, optimizer))
    optimizer.set_steps(3)
    for step in range(3, 5):
        set_gradients(resumed, step)
        optimizer.step(0.1)
    for p, q in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "change", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": 0.0}, {"weight_decay": -0.1}]
)
def test_constants_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"betas lie in \[0, 1\), eps is positive, weight_decay"):
        replace(CONFIG, **change)
