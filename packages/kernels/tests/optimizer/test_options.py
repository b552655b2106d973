"""Options, parameters and gradients that ``FusedAdamW`` does not take."""

from typing import Any

import pytest
import torch
from torch import nn

from fivefold.kernels import BackendError, FusedAdamW, KernelInputError


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
