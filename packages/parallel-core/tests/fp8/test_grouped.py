"""Experts' products in FP8: an explicit emulation, and the scales of all ranks on each."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.parallel_core.fp8 import grouped, scaling
from fivefold.parallel_core.fp8.grouped import grouped_linear
from fivefold.parallel_core.fp8.scaling import E4M3, E5M2, Format
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Axis, Topology

from .plain import PLAIN, fake

COUNTS = (3, 0, 4, 2)


def values() -> tuple[Tensor, Tensor, Tensor]:
    """Rows (9, 6), matrices (4, 5, 6) and the gradient of the result (9, 5)."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((9, 6), (4, 5, 6), (9, 5))
    x, weight, dy = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return x * 1e-2, weight, dy * 7


def ends(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def run(
    x: Tensor, weight: Tensor, dy: Tensor, counts: tuple[int, ...], axis: Axis | None, form: Format
) -> dict[str, Any]:
    scales: list[float] = []

    def scale_of(*args: Any) -> Tensor:
        scale = scaling.scale_of(*args)
        scales.append(float(scale))
        return scale

    grouped.scale_of = scale_of  # type: ignore[attr-defined]
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    try:
        y = grouped_linear(x, weight, ends(counts), axis, form, PLAIN)
        y.backward(dy)
    finally:
        grouped.scale_of = scaling.scale_of  # type: ignore[attr-defined]
    return {"scales": scales, "y": y.detach(), "dx": x.grad, "dw": weight.grad}


@pytest.mark.parametrize("form", [Format(), Format(E4M3, True)], ids=["e5m2", "e4m3 powers of 2"])
def test_an_explicit_emulation(form: Format) -> None:
    x, weight, dy = values()
    found = run(x, weight, dy, COUNTS, None, form)
    x, weight = (fake(each, power_of_2=form.power_of_2) for each in (x, weight))
    dy = fake(dy, form.grad_dtype, form.power_of_2)
    spans = [(0, 3), (3, 3), (3, 7), (7, 9)]
    y = torch.cat([x[a:b] @ w.T for (a, b), w in zip(spans, weight, strict=True)])
    dx = torch.cat([dy[a:b] @ w for (a, b), w in zip(spans, weight, strict=True)])
    dw = torch.stack([dy[a:b].T @ x[a:b] for a, b in spans])
    for key, expected in (("y", y), ("dx", dx), ("dw", dw)):
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12)
    assert float(dy.abs().max()) > 0 and form.grad_dtype in (E4M3, E5M2)


def test_a_frozen_matrix_or_input_gets_no_gradient() -> None:
    x, weight, dy = values()
    x.requires_grad_()
    grouped_linear(x, weight, ends(COUNTS), None, Format(), PLAIN).backward(dy)
    assert x.grad is not None and weight.grad is None
    weight.requires_grad_()
    grouped_linear(x.detach(), weight, ends(COUNTS), None, Format(), PLAIN).backward(dy)
    assert weight.grad is not None


def of_rank(degrees: dict[str, int]) -> dict[str, Any]:
    """Two experts and their rows, or half of every expert's features, on each rank."""
    axis = Topology(Layout(2, tp=2, **degrees)).axis("etp-ep")
    x, weight, dy = values()
    if "ep" in degrees:
        rows, experts = (
            [slice(0, 3), slice(3, 9)][axis.rank],
            slice(2 * axis.rank, 2 * axis.rank + 2),
        )
        counts = COUNTS[experts]
        return run(x[rows], weight[experts], dy[rows], counts, axis, Format())
    part = [slice(0, 2), slice(2, 5)][axis.rank]
    return run(x, weight[:, part], dy[:, part], COUNTS, axis, Format())


def test_experts_over_ranks_have_the_scales_and_the_values_of_one() -> None:
    expected = run(*values(), COUNTS, None, Format())
    found = launch(of_rank, 2, {"ep": 2}, timeout=60)
    for each in found:
        assert each["scales"] == expected["scales"] and len(set(each["scales"])) == 3
    for key in ("y", "dx", "dw"):
        assert torch.equal(torch.cat([each[key] for each in found]), expected[key])


def test_slices_of_experts_over_ranks_have_the_scales_of_one() -> None:
    expected = run(*values(), COUNTS, None, Format())
    found = launch(of_rank, 2, {"etp": 2}, timeout=60)
    for each in found:
        assert each["scales"] == expected["scales"]
    close = {"rtol": 1e-12, "atol": 1e-14}
    for key in ("y", "dw"):
        whole = torch.cat([each[key] for each in found], 1)
        torch.testing.assert_close(whole, expected[key], **close)
    torch.testing.assert_close(found[0]["dx"] + found[1]["dx"], expected["dx"], **close)
