"""What ``FusedAdamW`` keeps: state dicts of its own and of torch, copies, pickles."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fivefold.kernels import FusedAdamW, KernelInputError

from .parts import (
    OPTIONS,
    assert_equal,
    make_model,
    train,
    values,
)


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
