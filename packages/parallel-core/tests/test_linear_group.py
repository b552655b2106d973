import pytest
import torch
from torch import nn

from fivefold.parallel_core.linear_group import LinearGroup


def test_a_group_calls_every_linear_on_one_input_in_order() -> None:
    linears = {"wide": nn.Linear(3, 5), "narrow": nn.Linear(3, 2, bias=False)}
    group = LinearGroup(linears)
    x = torch.randn(4, 7, 3)
    wide, narrow = group(x)
    assert torch.equal(wide, linears["wide"](x))
    assert torch.equal(narrow, linears["narrow"](x))


def test_parameters_keep_the_names_of_their_linears() -> None:
    group = LinearGroup({"k_proj": nn.Linear(3, 2), "a_proj": nn.Linear(3, 2, bias=False)})
    names = [name for name, _ in group.named_parameters()]
    assert names == ["k_proj.weight", "k_proj.bias", "a_proj.weight"]


def test_linears_of_different_inputs_are_refused_with_their_widths() -> None:
    with pytest.raises(ValueError, match=r"'a': 3, 'b': 4.*must be equal"):
        LinearGroup({"a": nn.Linear(3, 2), "b": nn.Linear(4, 2)})
