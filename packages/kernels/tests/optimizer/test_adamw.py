"""``FusedAdamW`` against ``torch.optim.AdamW`` and ``AveragedModel``."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fivefold.kernels import FusedAdamW, KernelInputError

from .parts import (
    BACKENDS,
    OPTIONS,
    ROUNDING,
    STEPS,
    assert_equal,
    gradients,
    make_model,
    put,
    train,
    values,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_20_steps_are_those_of_adamw(backend: str) -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    train(model, FusedAdamW(model.parameters(), **OPTIONS, backend=backend), 20)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), 20)
    assert_equal(values(model), values(theirs), within=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maximize_is_that_of_adamw(backend: str) -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    train(model, FusedAdamW(model.parameters(), **OPTIONS, maximize=True, backend=backend), 2)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS, maximize=True), 2)
    assert_equal(values(model), values(theirs), within=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_near_float64(backend: str) -> None:
    exact = make_model()
    model = copy.deepcopy(exact).float()
    train(model, FusedAdamW(model.parameters(), **OPTIONS, backend=backend), STEPS[backend])
    train(exact, torch.optim.AdamW(exact.parameters(), **OPTIONS), STEPS[backend])
    assert_equal(values(model), values(exact), within=2e-6)


def test_defaults_are_those_of_adamw() -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    train(model, FusedAdamW(model.parameters()), 3)
    train(theirs, torch.optim.AdamW(theirs.parameters()), 3)
    assert_equal(values(model), values(theirs), within=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_average_is_that_of_averaged_model(backend: str, kind: str) -> None:
    model = make_model()
    theirs = copy.deepcopy(model)
    asked: dict[str, Any] = {"ema_decay": 0.9} if kind == "ema" else {"swa": True}
    average = get_ema_multi_avg_fn(0.9) if kind == "ema" else get_swa_multi_avg_fn()
    averaged = AveragedModel(theirs, multi_avg_fn=average)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS, **asked, backend=backend)
    train(model, optimizer, STEPS[backend])
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    train(theirs, other, STEPS[backend], after=lambda: averaged.update_parameters(theirs))
    # torch has the weights of an equal average in float32.
    assert_equal(optimizer.ema_state(), values(averaged), 1e-12 if kind == "ema" else 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_of_some_steps(backend: str) -> None:
    model = make_model()
    optimizer = FusedAdamW(model.parameters(), swa=True, backend=backend)
    seen = []
    for index, grads in enumerate(gradients(model, 6)):
        put(model, grads)
        optimizer.step(average=index % 2 == 1)
        seen.append(values(model))
        if index == 0:
            assert_equal(optimizer.ema_state(), values(model))
    expected = [sum(each) / 3 for each in zip(*seen[1::2], strict=True)]
    assert_equal(optimizer.ema_state(), expected, within=1e-12)


def test_averaged_puts_averages_in_and_back() -> None:
    model = make_model(torch.float32)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS, ema_decay=0.5)
    train(model, optimizer, 3)
    own, averages = values(model), [each.clone() for each in optimizer.ema_state()]
    with pytest.raises(RuntimeError, match="evaluation"), optimizer.averaged():
        assert_equal(values(model), averages)
        with pytest.raises(KernelInputError, match="would train the averages"):
            optimizer.step()
        with pytest.raises(KernelInputError, match="in force"), optimizer.averaged():
            pass
        raise RuntimeError("evaluation")
    assert_equal(values(model), own)
    assert any(not torch.equal(a, b) for a, b in zip(own, averages, strict=True))
    train(model, optimizer, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_those_of_a_float32_run(backend: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    exact = copy.deepcopy(model).float()
    options: dict[str, Any] = {**OPTIONS, "ema_decay": 0.8, "max_norm": 3.0, "backend": backend}
    optimizer = FusedAdamW(model.parameters(), **options, master_weights=True)
    theirs = FusedAdamW(exact.parameters(), **options)
    for grads in gradients(model, STEPS[backend]):
        rounded = [None if grad is None else grad.to(dtype) for grad in grads]
        for each, ours in ((model, optimizer), (exact, theirs)):
            put(each, rounded)
            ours.step()
    within = ROUNDING[backend] if dtype == torch.bfloat16 else 0.0
    assert_equal(values(model), [each.to(dtype) for each in values(exact)], within)
    masters = [state["master"] for state in optimizer.state.values()]
    assert_equal(masters, [p.detach() for p in exact.parameters() if p.grad is not None])
    assert_equal(optimizer.ema_state(), theirs.ema_state())
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_without_masters_rounds_once_a_step(backend: str) -> None:
    model = make_model(torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS, ema_decay=0.9, backend=backend)
    exact = copy.deepcopy(model).double()
    put(model, next(gradients(model, 1)))
    put(exact, [None if p.grad is None else p.grad.double() for p in model.parameters()])
    optimizer.step()
    torch.optim.AdamW(exact.parameters(), **OPTIONS).step()
    expected = [each.bfloat16() for each in values(exact)]
    assert_equal(values(model), expected, within=ROUNDING[backend])
    assert_equal(optimizer.ema_state(), values(model))
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())


def test_threads_do_not_change_results() -> None:
    """No sum depends on how the work is divided."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(50_001))
        weight.grad = torch.randn(50_001)
        optimizer = FusedAdamW([weight], max_norm=1.0, ema_decay=0.9, backend="cpu")
        optimizer.step()
        results.append([weight.detach(), optimizer.grad_norm])
    torch.set_num_threads(1)
    assert_equal(results[0], results[1])
