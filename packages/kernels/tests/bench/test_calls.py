"""Calls that share their inputs."""

import pytest
import torch

from fivefold.kernels.bench.calls import Call, Values, named_tensors, output_gradients

from .parts import double, inputs


def test_forward_alone() -> None:
    given = inputs()
    results = Call(double, Values(given)).results()
    assert list(results) == ["result 0"]
    assert torch.equal(results["result 0"], given["x"] * 2)


def test_gradients_are_of_the_given_output_gradients() -> None:
    given = inputs()
    weights = output_gradients(double, given)
    results = Call(double, Values(given, weights)).results()
    assert torch.equal(results["gradient of x"], 2 * weights[0])
    assert given["x"].grad is None


def test_results_without_a_gradient_are_not_differentiated() -> None:
    def function(x, k):
        return x * k[0], x.detach(), (x * k[1]).sum()

    given = inputs() | {"k": [torch.tensor(2.0), torch.tensor(3.0, requires_grad=True)]}
    weights = output_gradients(function, given)
    assert [w is None for w in weights] == [False, True, False]
    results = Call(function, Values(given, weights)).results()
    assert set(results) == {
        *("result 0", "result 1", "result 2"),
        *("gradient of x", "gradient of k[1]"),
    }
    expected = 2 * weights[0] + 3 * weights[2]
    assert torch.allclose(results["gradient of x"], expected)


def test_same_output_gradients_for_all() -> None:
    first, second = (output_gradients(double, inputs())[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inputs_that_are_written_over_are_restored() -> None:
    @torch.no_grad()
    def overwrite(x, rest):
        x.add_(1)
        rest[0].mul_(2)
        return x

    given = {"x": torch.zeros(3), "rest": [torch.ones(2), torch.ones(2)]}
    call = Call(overwrite, Values(given))
    results = call.results()
    assert call.writes
    assert set(results) == {"result 0", "changed x", "changed rest[0]"}
    # The result lies in memory that was restored since.
    assert results["result 0"].tolist() == [1, 1, 1]
    assert call.results()["changed rest[0]"].tolist() == [2, 2]
    assert given["x"].tolist() == [0, 0, 0]


def test_output_gradients_that_are_written_over_are_restored() -> None:
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2)

    given = inputs()

    def function(x):
        return Greedy.apply(x)

    weights = output_gradients(function, given)
    call = Call(function, Values(given, weights))
    for _ in range(3):
        assert torch.equal(call.results()["gradient of x"], 2 * weights[0])
    assert call.writes


def test_values_are_restored_after_an_error() -> None:
    def breaks(x):
        x.add_(1)
        raise RuntimeError("broke")

    values = Values({"x": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="broke"):
        Call(breaks, values).results()
    assert not values.changed()


def test_nothing_changed_nothing_to_restore() -> None:
    given = inputs() | {"y": torch.ones(3).to(torch.float8_e4m3fn)}
    call = Call(lambda x, y: x * 2, Values(given))
    call.results()
    assert not call.writes


def test_layout_in_memory_is_kept() -> None:
    given = {"x": torch.ones(3, 4).T}
    seen = []
    Call(lambda x: seen.append(x.stride()), Values(given))()
    assert seen == [(1, 4)]


def test_tensors_of_lists_have_names() -> None:
    x = torch.ones(1)
    assert [n for n, _ in named_tensors({"a": x, "b": [x, (x,)], "c": 3})] == [
        "a",
        "b[0]",
        "b[1][0]",
    ]
