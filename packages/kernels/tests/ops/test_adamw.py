"""``adamw_step`` and ``gradient_norm`` on every backend."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.adamw import adamw_settings, adamw_step, gradient_norm, op, tables
from fivefold.kernels.ops.adamw.samples import SAMPLES
from fivefold.kernels.testing import assert_close, op_tests

BACKENDS = op.BACKENDS

TestLaws = op_tests(SAMPLES, ops=(op.adamw_step, op.gradient_norm))


def call(backend: str | None = None, **changed: Any) -> dict[str, Any]:
    """One step on ones; gives its arguments."""
    inputs: dict[str, Any] = {
        name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    inputs |= {"steps": [torch.tensor(0.0)], "settings": adamw_settings(), **changed}
    adamw_step(**inputs, backend=backend)
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", SAMPLES.dtypes)
def test_norm_is_that_of_torch(backend: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (8193, 0, 1, 130)]
    exact = torch.linalg.vector_norm(torch.cat(tensors).double())
    assert_close("norm", gradient_norm(tensors, backend), exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-30, 0.0])
def test_norm_of_extremes(backend: str, value: float) -> None:
    found = gradient_norm([torch.tensor([0.0, value], dtype=torch.float64)], backend)
    torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_without_memory(backend: str) -> None:
    """With betas of 0 a step is the gradient over its own size."""
    settings = adamw_settings(lr=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    grads = [torch.tensor([2.0, -3.0, 1e-3])]
    inputs = call(backend, settings=settings, grads=grads)
    torch.testing.assert_close(inputs["params"][0], torch.tensor([0.5, 1.5, 0.5]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_late_steps_have_no_bias_to_correct(backend: str) -> None:
    steps = [torch.tensor(1e6)]
    inputs = call(backend, steps=steps, settings=adamw_settings(lr=0.5, weight_decay=0.0))
    torch.testing.assert_close(inputs["params"][0], torch.full((3,), 0.5))
    assert steps[0] == 1e6 + 1


def test_no_tensors_are_no_work() -> None:
    adamw_step([], [], [], [], [], adamw_settings())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grads": []}, "a tensor of grads for each of 1 params, found 0"),
        ({"masters": [torch.ones(3)] * 2}, "of masters for each of 1 params, found 2"),
        ({"params": [torch.ones(3).int()]}, r"params has to be of .*, found torch\.int32"),
        ({"exp_avgs": [torch.ones(3).half()]}, r"exp_avgs has to be of torch\.float32, found"),
        ({"exp_avg_sqs": [torch.ones(3).double()]}, r"exp_avg_sqs has to be of torch\.float32"),
        ({"masters": [torch.ones(3).double()]}, r"masters has to be of torch\.float32"),
        ({"steps": [torch.tensor(1)]}, r"steps has to be of torch\.float32, found torch\.int64"),
        ({"steps": [torch.ones(1)]}, r"steps\[0\] has to be of shape \(\), found \(1,\)"),
        ({"grads": [torch.ones(4)]}, r"grads\[0\] has to be of shape \(3,\), found \(4,\)"),
        ({"grads": [torch.ones(3).to_sparse()]}, r"grads has to be of torch\.strided"),
        ({"grads": [torch.ones(3, device="meta")]}, r"of all, cpu, found torch\.float32 on meta"),
        ({"averages": [torch.ones(3)]}, "1 averages and 0 average_counts"),
        ({"settings": torch.ones(6)}, r"float64 \(6,\) on cpu, found torch\.float32 \(6,\)"),
    ],
)
def test_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        call(**changed)


def test_lists_of_several_dtypes_do_not_fit() -> None:
    mixed = [torch.ones(3), torch.ones(3).double()]
    with pytest.raises(
        KernelInputError, match=r"one dtype .* torch\.float32 on cpu, torch\.float64"
    ):
        gradient_norm(mixed)
    with pytest.raises(KernelInputError, match="at least one tensor"):
        gradient_norm([])


def test_gradients_of_a_wider_dtype() -> None:
    for wide, narrow in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        inputs = {
            name: [torch.ones(3, dtype=narrow)] for name in ("params", "exp_avgs", "exp_avg_sqs")
        }
        grads = [torch.tensor([0.1, -2.0, 3.0], dtype=wide)]
        found = call("cpu", grads=grads, **inputs)["params"][0]
        copies = {name: [torch.ones(3, dtype=narrow)] for name in inputs}
        expected = call("reference", grads=[grads[0].to(narrow)], **copies)["params"][0]
        torch.testing.assert_close(found, expected)


# ---- Tables -------------------------------------------------------------------------------------


def test_tables_are_made_once_for_the_same_addresses() -> None:
    tensors = [torch.ones(3), torch.ones(2)]
    device = tensors[0].device
    first = tables.table(tables.addresses([tensors, []]), device)
    assert tables.table(tables.addresses([tensors, []]), device) is first
    assert first.tolist() == [[x.data_ptr() for x in tensors], [0, 0]]
    other = tables.table(tables.addresses([[torch.ones(3), tensors[1]], []]), device)
    assert other[0, 0] != first[0, 0]


def test_pieces_cover_every_tensor_once() -> None:
    starts = ((0, 32, 48, 64), (16, 20, 48, 64))
    found = tables.pieces(starts, (5, 9, 0, 4), 4, torch.device("cpu"))
    assert [(aligned, pieces.tolist()) for aligned, pieces in found] == [
        (True, [[0, 0], [0, 4], [3, 0]]),
        (False, [[1, 0], [1, 4], [1, 8]]),
    ]


def test_kernels_are_recorded_without_addresses() -> None:
    from fivefold.kernels.launch import record

    def on_meta(x: Tensor) -> Tensor:
        return x.to("meta")

    tensors = [on_meta(torch.ones(3)), on_meta(torch.ones(9000))]
    steps = [on_meta(torch.tensor(0.0))] * 2
    with record() as launches:
        adamw_step(tensors, tensors, tensors, tensors, steps, on_meta(adamw_settings()))
    assert [launch.grid for launch in launches] == [(2,), (3,)]
