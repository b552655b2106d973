"""The moving average follows the parameters and stands in for them."""

import torch
from torch import nn

from fivefold.fold.training.average import MovingAverage
from fivefold.parallel_core.parameters import ParameterTable


def test_the_average_follows_and_stands_in() -> None:
    model = nn.Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = MovingAverage(ParameterTable.of(model).pieces(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(0.75)
    parts = average.parts()
    assert set(parts) == {"ema.weight", "ema.bias"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parts[f"ema.{name}"].tensor, start[name] + 0.25)
        with average.in_place():
            torch.testing.assert_close(parameter.detach(), start[name] + 0.25)
        torch.testing.assert_close(parameter.detach(), start[name] + 1.0)
