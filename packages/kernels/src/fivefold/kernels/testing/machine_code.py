"""The laws of machine code as a class of pytest tests: ``TestMachineCode``, one a package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.kernels import samples
from fivefold.kernels.offline import records
from fivefold.kernels.offline.compare import broken_laws, compare
from fivefold.kernels.offline.compile import TARGETS
from fivefold.kernels.offline.records import Record

Found = tuple[list[Record], str]


def machine_code_tests(package: str, table: Path) -> type:
    """Tests of the machine code of all kernels of a package, compiled for sm_90a without a GPU.

    Those that compile are skipped where triton or cuda.core is not installed. The committed table
    has to obey the laws on every architecture.

    Args:
        package: as the entry point group ``fivefold.kernels`` names it.
        table: what ``fivefold-kernels report --json`` wrote of its ops.
    """

    class TestMachineCode:
        @pytest.fixture(scope="class")
        @classmethod
        def found(cls, tmp_path_factory: pytest.TempPathFactory) -> Found:
            pytest.importorskip("triton")
            pytest.importorskip("cuda.core")
            return _report(package, tmp_path_factory.mktemp("report") / "found.json")

        def test_every_kernel_obeys_the_laws(self, found: Found) -> None:
            faults = [
                f"{record.title} {fault}" for record in found[0] for fault in broken_laws(record)
            ]
            assert not faults, "\n".join(faults)
            assert "to mend" not in found[1]

        def test_the_table_obeys_the_laws_on_every_architecture(self) -> None:
            committed = records.read(table)
            assert {record.target for record in committed} == TARGETS.keys()
            faults = [
                f"{record.title} {fault}" for record in committed for fault in broken_laws(record)
            ]
            assert not faults, "\n".join(faults)

        def test_every_op_that_needs_tensor_cores_has_them(self, found: Found) -> None:
            with_them = {record.op for record in found[0] if record.needs_tensor_cores}
            assert {op for op in _names(package) if _needs_tensor_cores(package, op)} <= with_them

        def test_nothing_is_worse_than_in_the_committed_table(self, found: Found) -> None:
            committed = records.read(table)
            compilers = [{each.compiler for each in some} for some in (found[0], committed)]
            if compilers[0] != compilers[1]:
                pytest.skip(f"the table is of {compilers[1]}, here is {compilers[0]}")
            comparison = compare(found[0], committed)
            assert comparison.worse == []
            # Then the table is old: fivefold-kernels report --json makes another.
            assert comparison.unknown == comparison.gone == []

    return TestMachineCode


def _report(package: str, file: Path) -> Found:
    # Triton's interpreter, which tests have on, is chosen once a process.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    ops = [f"{package}/{op}" for op in _names(package)]
    command = [sys.executable, "-m", "fivefold.kernels", "report", *ops]
    finished = subprocess.run(
        [*command, "--target", "sm_90a", "--json", str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return records.read(file), finished.stdout


def _names(package: str) -> list[str]:
    return [op for owner, op, _ in samples.modules() if owner == package]


def _needs_tensor_cores(package: str, op: str) -> bool:
    return samples.load(op, package).tensor_cores
