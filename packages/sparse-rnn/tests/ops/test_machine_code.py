"""The machine code of this package's kernels, compiled without a GPU."""

from pathlib import Path

from fivefold.kernels.testing import machine_code_tests

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TestMachineCode = machine_code_tests("sparse-rnn", BENCHMARKS / "offline.json")
