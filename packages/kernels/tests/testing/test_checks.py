"""The kit on ops that are wrong: each law has a way to fail."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.kernels.op import Op, define
from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample
from fivefold.kernels.testing import checks


def _shapes(x: Tensor, backend: str | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _make_op(name: str, forward: Any, slope: float, monkeypatch: pytest.MonkeyPatch) -> OpSamples:
    """An op whose reference doubles, whose other backend is ``forward`` with gradient ``slope``."""
    shapes = type(_shapes)(_shapes.__code__, globals(), name)
    shapes.__annotations__ = _shapes.__annotations__
    op = define("fivefold_kernels_tests", backends=("aten", "reference"))(shapes)
    op.differentiate(lambda ctx, inputs, output: None, lambda ctx, dy: (dy * slope, None))
    monkeypatch.setattr(
        Op,
        "implementation",
        lambda self, backend: (lambda x: x * 2) if backend == "reference" else forward,
    )
    monkeypatch.setattr(Op, "refusal", lambda *_: None)

    def inputs(make: Maker) -> Inputs:
        return {"x": make.normal(3, 5)}

    sample = Sample(name="usual", inputs=inputs)
    return OpSamples(
        name=name,
        function=lambda x, backend=None: op(x, backend),
        eager=lambda x: x * 2,
        small=(sample,),
        real=(),
        laptop=(),
        cost=lambda _: (Cost(bytes=0), Cost(bytes=0)),
    )


def _check(op: OpSamples, layout: str = "contiguous") -> None:
    checks.check_values(op, op.small[0], "aten", torch.float32, layout)


def test_right_values_pass_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _make_op("right", lambda x: x + x, 2.0, monkeypatch)
    for layout in checks.LAYOUTS:
        _check(op, layout)
    checks.check_registration(op, op.small[0], torch.float32)
    checks.check_compiled(op, op.small[0], "aten", torch.float32)


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _make_op("wrong_result", lambda x: x * 2.001, 2.0, monkeypatch)
    with pytest.raises(AssertionError, match=r"wrong_result\(usual\) on aten.*: result 0"):
        _check(op)


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _make_op("wrong_gradient", lambda x: x * 2, 2.001, monkeypatch)
    with pytest.raises(AssertionError, match="gradient of x"):
        _check(op)


def test_memory_that_was_never_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:-1] = x[:-1] * 2
        return y

    op = _make_op("forgets", forget, 2.0, monkeypatch)
    with pytest.raises(AssertionError, match=r"5 of 15 values .* nan instead of"):
        _check(op)


def test_strides_that_are_ignored_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(x: Tensor) -> Tensor:
        return torch.as_strided(x, x.shape, (x.shape[1], 1)) * 2

    op = _make_op("careless", careless, 2.0, monkeypatch)
    _check(op)
    with pytest.raises(AssertionError, match="strided: result 0"):
        _check(op, "strided")
    with pytest.raises(AssertionError, match="transposed: result 0"):
        _check(op, "transposed")


def test_an_op_that_returns_its_input_fails_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _make_op("aliases", lambda x: x, 2.0, monkeypatch)
    monkeypatch.setattr(Op, "implementation", lambda self, backend: lambda x: x)
    with pytest.raises(Exception, match="alias"):
        checks.check_registration(op, op.small[0], torch.float32)


def test_a_sample_that_reaches_no_op_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _make_op("unreached", lambda x: x * 2, 2.0, monkeypatch)
    plain = OpSamples(
        name="plain",
        function=lambda x, backend=None: x * 2,
        eager=op.eager,
        small=op.small,
        real=(),
        laptop=(),
        cost=op.cost,
    )
    with pytest.raises(AssertionError, match="reaches no registered op"):
        checks.check_registration(plain, plain.small[0], torch.float32)
