"""Kernels compiled without a GPU: an op with known faults, and all ops of this package."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fivefold.kernels import BackendError
from fivefold.kernels.offline import records
from fivefold.kernels.offline.compare import broken_laws
from fivefold.kernels.offline.records import Record
from fivefold.kernels.offline.report import survey
from fivefold.kernels.testing import machine_code_tests

pytest.importorskip("triton")
pytest.importorskip("cuda.core")

HERE = Path(__file__).parent

TestMachineCode = machine_code_tests("kernels", HERE.parents[1] / "benchmarks" / "offline.json")


def compiling(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter, which a process chooses once."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Record], list[str]]:
    file = tmp_path_factory.mktemp("tiny") / "tiny.json"
    finished = compiling([str(HERE / "survey_tiny.py"), str(file), "2", "sm_90a"])
    assert finished.returncode == 0, finished.stderr
    failures = [text for _, text in json.loads(finished.stdout)]
    return {record.sample: record for record in records.read(file)}, failures


def test_a_good_kernel(tiny: tuple[dict[str, Record], list[str]]) -> None:
    good = tiny[0]["good"]
    assert (good.package, good.op, good.kernel) == ("tests", "tiny", "copy_kernel")
    assert (good.load_bytes, good.store_bytes, good.num_warps) == (16, 16, 4)
    assert 8 <= good.registers <= 64
    assert good.moved_bytes == 2 * (2 * 1024 * 4096) + 2
    assert broken_laws(good) == []


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        ("strided", "loads 64 bytes of its tiles by less than 16"),
        ("offset", "stores 64 bytes of its tiles by less than 16"),
        ("spilling", "spills"),
    ],
)
def test_faults_are_found(
    tiny: tuple[dict[str, Record], list[str]], sample: str, fault: str
) -> None:
    (found,) = broken_laws(tiny[0][sample])
    assert found.startswith(fault)


def test_tensor_cores_are_found(tiny: tuple[dict[str, Record], list[str]]) -> None:
    matrices, exact = tiny[0]["matrices"], tiny[0]["exact_matrices"]
    assert matrices.tensor_core.keys() == {"HGMMA"} and matrices.needs_tensor_cores
    assert matrices.shared_bytes > 0
    assert not exact.tensor_core and exact.has_dot and not exact.needs_tensor_cores


def test_kernels_of_cuda_are_compiled_too(tiny: tuple[dict[str, Record], list[str]]) -> None:
    barrier = tiny[0]["barrier"]
    assert (barrier.kernel, barrier.num_warps, barrier.num_stages) == ("normalize", 8, 0)
    assert barrier.compiler.startswith("nvrtc ")
    assert 1000 < barrier.shared_bytes <= 1016
    assert (barrier.load_bytes, barrier.store_bytes, barrier.spill_bytes) == (16, 16, 0)
    assert broken_laws(barrier) == []


def test_what_fails_is_named_and_hides_nothing(
    tiny: tuple[dict[str, Record], list[str]],
) -> None:
    found, failures = tiny
    for part in (
        "FAILED: tests/broken: ImportError: no such thing",
        "FAILED: tests/tiny (unfinished, bfloat16): triton: RuntimeError: half written",
        "FAILED: tests/tiny copy_kernel (unfit, bfloat16): CompileError: parameter y_ptr has no",
        "FAILED: tests/tiny kernel (nested, bfloat16): CompileError: nested.<locals>.kernel",
        "FAILED: tests/tiny wrong_kernel (wrong, bfloat16, sm_90a): CompilationError",
    ):
        assert any(text.startswith(part) for text in failures), part
    assert len(failures) == 5
    assert "range must be a power of 2" in failures[-1]
    # What the unfinished op started before it failed.
    assert "unfinished" in found


def test_a_target_without_the_dtype_is_no_failure(tmp_path: Path) -> None:
    finished = compiling([str(HERE / "survey_tiny.py"), str(tmp_path / "a.json"), "1", "sm_80"])
    (text,) = [text for expected, text in json.loads(finished.stdout) if expected]
    assert text.startswith("not for this target: tests/tiny copy_kernel (float8, bfloat16, sm_80)")
    assert "fp8e4nv" in text and "\n" not in text
    by_sample = {record.sample: record for record in records.read(tmp_path / "a.json")}
    assert by_sample["matrices"].tensor_core.keys() == {"HMMA"}


def test_the_interpreter_is_refused() -> None:
    with pytest.raises(BackendError, match="unset TRITON_INTERPRET"):
        survey([], ["sm_90a"])
