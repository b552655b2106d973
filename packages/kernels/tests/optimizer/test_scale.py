"""What gradients are multiplied by: clipping, skipping and the scales of others."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivefold.kernels import FusedAdamW

from .parts import (
    BACKENDS,
    OPTIONS,
    STEPS,
    assert_equal,
    gradients,
    make_model,
    put,
    train,
    values,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_is_that_of_clip_grad_norm(backend: str, scale: float) -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS, max_norm=1.0, backend=backend)
    norms: list[tuple[Tensor, Tensor]] = []

    def clip() -> None:
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))

    def note() -> None:
        assert optimizer.grad_norm is not None
        found.append(optimizer.grad_norm)

    found: list[Tensor] = []
    train(model, optimizer, STEPS[backend], scale=scale, after=note)
    theirs_optimizer = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    train(theirs, theirs_optimizer, STEPS[backend], scale=scale, before=clip)
    assert_equal(found, norms, within=1e-12)
    assert_equal(values(model), values(theirs), within=1e-12)


def test_gradients_stay_as_they_are() -> None:
    model = make_model(torch.float32)
    grads = next(gradients(model, 1, 10.0))
    put(model, grads)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    FusedAdamW(model.parameters(), max_norm=1.0).step()
    assert_equal([p.grad for p in model.parameters() if p.grad is not None], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_steps_change_nothing_and_are_counted(backend: str, bad: float) -> None:
    model = make_model(torch.float32)
    options: dict[str, Any] = {**OPTIONS, "max_norm": 1.0, "ema_decay": 0.9}
    optimizer = FusedAdamW(model.parameters(), **options, skip_nonfinite=True, backend=backend)
    plain = copy.deepcopy(model)
    other = FusedAdamW(plain.parameters(), **options, backend=backend)
    for index, grads in enumerate(gradients(model, 5)):
        put(model, grads)
        if index in (0, 3):
            model.get_parameter("2.weight").grad[0, 0] = bad
        else:
            put(plain, grads)
            other.step()
        optimizer.step()
    assert optimizer.num_skipped == 2
    assert_equal(values(model), values(plain))
    assert_equal(optimizer.ema_state(), other.ema_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_factor_of_the_caller(backend: str) -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    optimizer = FusedAdamW(model.parameters(), max_norm=1.0, skip_nonfinite=True, backend=backend)
    other = torch.optim.AdamW(theirs.parameters())
    factors: list[float | Tensor] = [0.25, torch.tensor(0.5), torch.tensor([2.0])]
    for factor, grads in zip(factors, gradients(model, 3), strict=True):
        put(model, grads)
        optimizer.step(clip_factor=factor)
        put(theirs, [None if grad is None else grad * float(factor) for grad in grads])
        other.step()
    assert optimizer.grad_norm is None
    assert_equal(values(model), values(theirs), within=1e-12)
    optimizer.step(clip_factor=float("nan"))
    assert optimizer.num_skipped == 1
    assert_equal(values(model), values(theirs), within=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_scaler(backend: str) -> None:
    weight = nn.Parameter(torch.randn(6))
    other = nn.Parameter(weight.detach().clone())
    optimizer = FusedAdamW([weight], lr=0.1, max_norm=1.0, backend=backend)
    theirs = torch.optim.AdamW([other], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(6)
    for index in range(4):
        optimizer.zero_grad()
        theirs.zero_grad()
        factor = float("inf") if index == 1 else 1.0
        scaler.scale((weight * inputs).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if index != 1:
            (other * inputs).square().sum().backward()
            norm = nn.utils.clip_grad_norm_([other], 1.0)
            theirs.step()
            torch.testing.assert_close(optimizer.grad_norm, norm)
    assert optimizer.num_skipped == 1
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close(weight, other)
