"""Modules that become FP8: which, what stays, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.fp8.convert import Conversion
from fivefold.parallel_core.fp8.linears import FP8ColumnParallel, FP8Linear, FP8RowParallel
from fivefold.parallel_core.fp8.scaling import Format
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.parameters import ParameterTable
from fivefold.parallel_core.styles import ColumnParallel, RowParallel
from fivefold.parallel_core.topology import Topology

from .plain import PLAIN, fake


class Experts(nn.Module):
    """Stands for a package's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FP8Experts(Experts):
    """Its form in FP8."""


class MyLinear(nn.Linear):
    """A linear with a product of its own."""


CONVERSION = Conversion(Format(), PLAIN, experts={Experts: FP8Experts})


def test_linears_and_groups_of_them_keep_their_parameters() -> None:
    for kind in (nn.Linear, MyLinear):
        one, group = kind(6, 4), LinearGroup({"a": kind(6, 4), "b": kind(6, 2)})
        x, before = torch.randn(3, 6), dict(group.named_parameters())
        CONVERSION.change(one, "one")
        CONVERSION.change(group, "group")
        assert {type(each) for each in (one, *group.children())} == {FP8Linear}
        assert all(before[name] is p for name, p in group.named_parameters())
        expected = torch.nn.functional.linear(fake(x), fake(one.weight), one.bias)
        assert torch.equal(one(x), expected)


def test_experts_get_what_they_need() -> None:
    experts = Experts()
    CONVERSION.change(experts, "experts")
    assert type(experts) is FP8Experts
    assert (experts.ranks, experts.format, experts.products) == (None, Format(), PLAIN)


def test_what_has_no_form_or_has_it_already_is_refused() -> None:
    linear = nn.Linear(4, 4)
    CONVERSION.change(linear, "a.b")
    for module in (linear, nn.Bilinear(2, 2, 2)):
        with pytest.raises(ConfigError, match=r"'a.b' is a \w+, which has no FP8 form; the recipe"):
            CONVERSION.change(module, "a.b")
    with pytest.raises(ConfigError, match="RowParallelLinear and Experts, once"):
        CONVERSION.change(nn.Identity(), "a")


def split_layers() -> list[str]:
    topology = Topology(Layout(2, tp=2))
    table = ParameterTable(topology)
    up = ColumnParallel(sequence=True).apply(nn.Linear(4, 6), "up", table)
    down = RowParallel(sequence=True).apply(nn.Linear(6, 4), "down", table)
    model = nn.Sequential(up, down)
    try:
        CONVERSION.check(model)
    except ConfigError as error:
        refused = str(error)
    conversion = Conversion(Format(), PLAIN, topology)
    conversion.check(model)
    for name, module in model.named_children():
        conversion.change(module, name)
    assert (type(up), type(down)) == (FP8ColumnParallel, FP8RowParallel)
    assert (up.how.gather, up.how.x, up.how.weight, up.how.y) == (True, True, True, True)
    assert (down.how.gather, down.how.x, down.how.weight, down.how.y) == (False, True, True, False)
    return [refused, up.how.axis.name, down.how.axis.name]


def test_split_layers_need_the_topology() -> None:
    for refused, *axes in launch(split_layers, 2, timeout=60):
        assert "the model lies over tp of 2 ranks, and their topology is missing" in refused
        assert axes == ["tp", "tp"]
