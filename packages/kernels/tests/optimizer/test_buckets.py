"""Parameters and gradients that are odd in memory, dtype or number, and options that change."""

import copy

import pytest
import torch
from torch import nn

from fivefold.kernels import FusedAdamW

from .parts import (
    BACKENDS,
    OPTIONS,
    assert_equal,
    make_model,
    train,
    values,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layouts(backend: str) -> None:
    """Transposed, with gaps, channels last, and gradients that lie otherwise."""
    bases = [torch.randn(4, 6), torch.randn(4, 9), torch.randn(2, 3, 4, 5)]
    params = [
        nn.Parameter(bases[0].t()),
        nn.Parameter(bases[1][:, ::3]),
        nn.Parameter(bases[2].contiguous(memory_format=torch.channels_last)),
    ]
    between = bases[1][:, 1::3].clone()
    plain = [nn.Parameter(each.detach().double().contiguous()) for each in params]
    optimizer = FusedAdamW(params, **OPTIONS, max_norm=0.1, ema_decay=0.5, backend=backend)
    exact = FusedAdamW(plain, **OPTIONS, max_norm=0.1, ema_decay=0.5, backend="reference")
    for _ in range(3):
        for param, other in zip(params, plain, strict=True):
            grad = torch.randn(param.shape)
            param.grad, other.grad = grad, grad.double()
        optimizer.step()
        exact.step()
    assert_equal([each.detach() for each in params], [each.detach() for each in plain], 1e-5)
    assert_equal(optimizer.ema_state(), exact.ema_state(), 1e-5)
    assert torch.equal(bases[1][:, 1::3], between)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_buffer(backend: str) -> None:
    """Not at multiples of 16 bytes, as where parameters are cut out of one buffer."""
    sizes = (3, 1030, 0, 8)
    flat, grads = torch.randn(1041), torch.randn(1041)
    whole = nn.Parameter(flat.clone())
    whole.grad = grads
    params = [nn.Parameter(each) for each in flat.split(sizes)]
    for param, grad in zip(params, grads.split(sizes), strict=True):
        param.grad = grad
    optimizers = [FusedAdamW(each, max_norm=1.0, backend=backend) for each in (params, [whole])]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert_equal([flat], [whole.detach()], within=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_dtypes_and_groups(backend: str) -> None:
    params = [nn.Parameter(torch.randn(5, dtype=d)) for d in (torch.float64, torch.float32)]
    half = nn.Parameter(torch.randn(5).bfloat16())
    groups = [{"params": params}, {"params": [half], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = FusedAdamW(groups, lr=0.1, max_norm=0.5, backend=backend)
    for param in (*params, half):
        param.grad = torch.randn_like(param)
    exact = [nn.Parameter(each.detach().double()) for each in (*params, half)]
    for param, other in zip((*params, half), exact, strict=True):
        other.grad = param.grad.to(torch.float64, copy=True)
    norm = nn.utils.clip_grad_norm_(exact, 0.5)
    torch.optim.AdamW(
        [{"params": exact[:2]}, {"params": exact[2:], "lr": 0.5, "weight_decay": 0.0}], lr=0.1
    ).step()
    optimizer.step()
    assert_equal([optimizer.grad_norm], [norm], within=1e-6)
    assert_equal([p.detach() for p in params], [p.detach() for p in exact[:2]], within=1e-6)
    assert_equal([half.detach()], [exact[2].detach()], within=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_dtype(backend: str) -> None:
    weight = nn.Parameter(torch.randn(9))
    weight.grad_dtype = None
    weight.grad = torch.randn(9).bfloat16()
    exact = nn.Parameter(weight.detach().clone())
    exact.grad = weight.grad.float()
    FusedAdamW([weight], backend=backend).step()
    FusedAdamW([exact], backend=backend).step()
    assert torch.equal(weight, exact)


def test_learning_rate_as_a_tensor_and_a_schedule() -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = FusedAdamW(model.parameters(), lr=rate)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
    train(model, optimizer, 5, after=lambda: rate.mul_(0.9))
    train(theirs, other, 5, after=schedule.step)
    assert_equal(values(model), values(theirs), within=1e-12)


def test_options_may_change_between_steps() -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    optimizers = [FusedAdamW(model.parameters()), torch.optim.AdamW(theirs.parameters())]
    for optimizer, each in zip(optimizers, (model, theirs), strict=True):
        train(each, optimizer, 2)
        optimizer.param_groups[0].update(betas=(0.5, 0.6), weight_decay=0.7, eps=0.1, lr=0.2)
        train(each, optimizer, 2)
    assert_equal(values(model), values(theirs), within=1e-12)


def test_autograd_notices_that_weights_changed() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    FusedAdamW([weight], backend="cpu").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_is_called_with_gradients_on() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = FusedAdamW([weight])

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(weight, torch.ones(2))


def test_step_without_any_gradient_does_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = FusedAdamW([weight], max_norm=1.0)
    assert optimizer.step() is None
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state
