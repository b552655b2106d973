"""The laws of an op as a class of pytest tests: ``TestRMSNorm = op_tests(SAMPLES)``."""

from collections.abc import Container
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch

from fivefold.kernels.errors import BackendError
from fivefold.kernels.op import Op
from fivefold.kernels.samples import OpSamples, Sample
from fivefold.kernels.testing import checks
from fivefold.kernels.testing.mutation import Mutant, a_few, folder_of, mutants_of, survives


def op_tests(op: OpSamples, *, ops: tuple[Op, ...], unbroken: Container[str] = ()) -> type:
    """Tests of an op on the CPU: every backend, sample, dtype and layout in memory.

    A backend may refuse a call, with its reason, but not all of them.

    Triton kernels run in the interpreter, so ``TRITON_INTERPRET=1`` has to be set before anything
    imports triton: in the ``conftest.py`` of the tests.

    Args:
        op: its samples.
        ops: its registered ops, which give the backends.
        unbroken: files that are not broken on purpose: what they decide is who computes when, which
            results do not show.
    """
    backends = [name for name in ops[0].backends if name != "cuda"]
    breakable = [name for name in ("triton", "cpu") if name in backends]
    cases = [
        pytest.param(sample, backend, dtype, id=f"{sample.name}-{backend}-{_short(dtype)}")
        for sample, backend in product(op.small, backends)
        for dtype in sample.dtypes or op.dtypes
    ]
    layouts = [
        pytest.param(backend, layout, id=f"{backend}-{layout}")
        for backend, layout in product(backends, ("strided", "transposed"))
    ]
    samples = [pytest.param(sample, id=sample.name) for sample in op.small]
    lowest = (op.small[0].dtypes or op.dtypes)[0]

    folder = folder_of(op)
    mutants = [
        pytest.param((backend, mutant), id=_place(backend, mutant))
        for backend in breakable
        for mutant in a_few(mutants_of(folder, backend))
        if mutant.file not in unbroken
    ]

    class Tests:
        @pytest.mark.parametrize(("sample", "backend", "dtype"), cases)
        def test_values(self, sample: Sample, backend: str, dtype: torch.dtype) -> None:
            with suppress(BackendError):
                checks.check_values(op, sample, backend, dtype)

        @pytest.mark.parametrize("backend", backends)
        def test_no_backend_refuses_everything(self, backend: str) -> None:
            checks.check_takes_some(op, backend)

        @pytest.mark.parametrize(("backend", "layout"), layouts)
        def test_layout_in_memory(self, backend: str, layout: str) -> None:
            for sample in op.small[:3]:
                with suppress(BackendError):
                    checks.check_values(op, sample, backend, checks.usual_dtype(op), layout)

        @pytest.mark.parametrize("sample", samples)
        def test_registration(self, sample: Sample) -> None:
            checks.check_registration(op, sample, (sample.dtypes or op.dtypes)[0])

        @pytest.mark.parametrize("backend", backends)
        def test_compiles_whole(self, backend: str) -> None:
            with suppress(BackendError):
                checks.check_compiled(op, op.small[0], backend, lowest)

        @pytest.mark.parametrize("mutant", mutants)
        def test_notices_a_broken_kernel(self, mutant: tuple[str, Mutant]) -> None:
            backend, change = mutant
            assert not survives(
                folder, backend, change, lambda: checks.check_backend(op, backend)
            ), f"{op.name}.{backend} {change}, and no sample shows it"

    if not mutants:  # all its kernels are another op's
        del Tests.test_notices_a_broken_kernel
    Tests.__name__ = Tests.__qualname__ = f"Test{op.name}"
    return Tests


def _place(backend: str, mutant: Mutant) -> str:
    """Of a mutant: C++ is told by the file, as its functions are not."""
    return f"{backend}-{mutant.function or mutant.file}-{mutant.kind}"


def _short(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
