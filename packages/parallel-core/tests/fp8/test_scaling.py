"""Scales: formula, extremes, and the whole tensor's on every rank."""

import math

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.fp8 import scaling
from fivefold.parallel_core.fp8.scaling import E4M3, E5M2
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology


@pytest.mark.parametrize(("dtype", "most"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_the_largest_value_becomes_the_largest_of_the_format(
    dtype: torch.dtype, most: float
) -> None:
    x = torch.tensor([0.25, -3.5, 1.0])
    (amax,) = scaling.largest([x], None)
    scale = scaling.scale_of(amax, dtype, False)
    assert float(scale) == pytest.approx(most / 3.5, rel=1e-7)
    assert float(scaling.rounded(x, scale, dtype).float()[1]) == -most
    power = float(scaling.scale_of(amax, dtype, True))
    assert power == 2 ** math.floor(math.log2(most / 3.5))


def test_nothing_and_zeros_have_a_finite_scale() -> None:
    for x in (torch.zeros(3, 2), torch.zeros(0, 2)):
        (amax,) = scaling.largest([x], None)
        scale = scaling.scale_of(amax, E4M3, False)
        assert float(amax) == 0 and math.isfinite(float(scale))
        assert torch.equal(scaling.rounded(x, scale, E4M3).float(), x)


def parts(world: int) -> list[list[Tensor]]:
    return [
        [torch.tensor([[float(rank), -2.0 * rank]]), torch.full((rank, 2), -rank / 3)]
        for rank in range(world)
    ]


def of_all(bad: bool) -> tuple[list[float], Tensor]:
    axis = Topology(Layout(2, tp=2)).axis("tp")
    mine = parts(2)[axis.rank]
    if bad and axis.rank == 0:
        mine[0][0, 0] = torch.nan
    found = scaling.largest(mine, axis)
    rounds = scaling.rounded(mine[0], torch.tensor(1.0), E4M3)
    return [float(each) for each in found], scaling.gathered(rounds, axis, 0).float()


def test_ranks_have_the_largest_of_all_and_gather_bytes() -> None:
    whole = torch.cat([part[0] for part in parts(2)])
    for amaxes, values in launch(of_all, 2, False, timeout=60):
        assert amaxes == [2.0, pytest.approx(1 / 3, rel=1e-7)]
        assert torch.equal(values, whole)


def test_a_nan_of_one_rank_is_a_nan_of_all() -> None:
    for amaxes, _ in launch(of_all, 2, True, timeout=60):
        assert math.isnan(amaxes[0]) and amaxes[1] == pytest.approx(1 / 3, rel=1e-7)
