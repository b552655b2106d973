"""``FusedAdamW`` against ``torch.optim.AdamW``, ``clip_grad_norm_`` and ``AveragedModel``."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fivefold.kernels import BackendError, FusedAdamW, KernelInputError

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


# ---- State dicts --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"ema_decay": 0.9}, {"swa": True, "max_norm": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_bitwise_the_same(asked: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    options = {**OPTIONS, **asked, "master_weights": dtype == torch.bfloat16}
    optimizer = FusedAdamW(model.parameters(), **options)
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4)

    resumed = make_model(dtype)
    resumed.load_state_dict(saved[0])
    again = FusedAdamW(resumed.parameters(), lr=9.0, max_norm=asked.get("max_norm"))
    again.load_state_dict(saved[1])
    train(resumed, again, 4)
    assert_equal(values(resumed), values(model))
    assert_equal(again.ema_state(), optimizer.ema_state())


def test_states_go_to_torch_and_back() -> None:
    model = make_model()
    alone = copy.deepcopy(model)
    classes = [torch.optim.AdamW, FusedAdamW, torch.optim.AdamW, FusedAdamW]
    state = None
    for make in classes:
        optimizer = make(model.parameters(), **OPTIONS)
        if state is not None:
            optimizer.load_state_dict(state)
        train(model, optimizer, 5)
        state = optimizer.state_dict()
    one = torch.optim.AdamW(alone.parameters(), **OPTIONS)
    for _ in classes:
        train(alone, one, 5)
    assert_equal(values(model), values(alone), within=1e-12)
    assert {"step", "exp_avg", "exp_avg_sq"} == set(state["state"][0])


def test_average_and_masters_begin_where_a_torch_state_is_continued() -> None:
    model = make_model(torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters(), **OPTIONS)
    train(model, theirs, 3)
    optimizer = FusedAdamW(model.parameters(), ema_decay=0.9, master_weights=True)
    optimizer.load_state_dict(theirs.state_dict())
    train(model, optimizer, 1)
    for param, state in optimizer.state.items():
        assert torch.equal(state["ema"], state["master"])
        assert torch.equal(state["master"].bfloat16(), param)
        assert float(state["step"]) == 4 and float(state["ema_step"]) == 1


def test_state_of_amsgrad_is_refused() -> None:
    model = make_model()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(KernelInputError, match="amsgrad"):
        FusedAdamW(model.parameters()).load_state_dict(theirs.state_dict())


def test_states_of_other_dtypes_and_layouts_become_the_parameters() -> None:
    wide = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    wide.grad = torch.randn_like(wide)
    theirs = torch.optim.AdamW([wide])
    theirs.step()
    narrow = nn.Parameter(wide.detach().float().t().contiguous().t())
    optimizer = FusedAdamW([narrow])
    optimizer.load_state_dict(theirs.state_dict())
    state = optimizer.state[narrow]
    assert state["exp_avg"].dtype == torch.float32
    assert state["exp_avg"].stride() == narrow.stride()
    assert_equal([state["exp_avg"]], [theirs.state[wide]["exp_avg"].float()])


def test_hooks_of_loading_are_heard() -> None:
    model = make_model(torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), master_weights=True)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    changed = copy.deepcopy(state)
    changed["state"][0]["master"].fill_(7.0)
    optimizer.register_load_state_dict_pre_hook(lambda *_: changed)
    optimizer.load_state_dict(state)
    first = next(model.parameters())
    assert torch.equal(optimizer.state[first]["master"], torch.full_like(first, 7.0).float())


def test_copies_and_pickles_go_on_alike() -> None:
    model = make_model(torch.float32)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS, max_norm=0.5, skip_nonfinite=True)
    train(model, optimizer, 2)
    others = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 2)
    for other_model, other in others:
        train(other_model, other, 2)
        assert other.max_norm == 0.5
        assert_equal(values(other_model), values(model))


# ---- What is odd about parameters and gradients -------------------------------------------------


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


# ---- Skipping and scaling -----------------------------------------------------------------------


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


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr has to be at least 0, found -1.0"),
        ({"lr": torch.ones(2)}, "lr has to be one value"),
        ({"eps": float("nan")}, "eps has to be at least 0, found nan"),
        ({"weight_decay": -0.1}, "weight_decay has to be at least 0"),
        ({"betas": (0.9, 1.0)}, r"below 1, found \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"max_norm": -1.0}, "max_norm has to be at least 0, found -1.0"),
        ({"ema_decay": 1.5}, "ema_decay has to be from 0 to 1, found 1.5"),
        ({"ema_decay": 0.9, "swa": True}, "choose one"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        FusedAdamW([nn.Parameter(torch.ones(2))], **options)


def test_parameters_that_it_does_not_take() -> None:
    optimizer = FusedAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(KernelInputError, match=r"found torch\.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2) * 1j)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedAdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(KernelInputError, match=r"dense gradients, found one of torch\.sparse_coo"):
        optimizer.step()


def test_missing_backend_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(BackendError, match="this op has triton, cpu, reference"):
        FusedAdamW([weight], backend="cuda").step()


# ---- Ranks --------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded_parameters(one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Linear(5, 3)
    theirs = copy.deepcopy(model)
    fully_shard(model, mesh=one_rank)
    optimizer = FusedAdamW(model.parameters(), max_norm=0.1, ema_decay=0.9)
    other = torch.optim.AdamW(theirs.parameters())
    inputs = torch.randn(4, 5)
    for _ in range(3):
        for each in (model, theirs):
            each.zero_grad()
            each(inputs).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    whole = [p.full_tensor().detach() for p in model.parameters()]
    assert_equal(whole, [p.detach() for p in theirs.parameters()], within=1e-6)
    assert all(isinstance(state["ema"], DTensor) for state in optimizer.state.values())
    with optimizer.averaged():
        pass
