"""Mutants of kernels."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fivefold.kernels import op as ways
from fivefold.kernels.ops.rms_norm.samples import SAMPLES
from fivefold.kernels.testing import mutation
from fivefold.kernels.testing.checks import check_values

KERNEL = """
import triton

def host(a, b):
    return a + b

@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr, mask=at < n, other=-float("inf"))
    x -= 1
    tl.store(x_ptr, tl.where(x > 0, -x, x), mask=at < n)
"""


def test_every_sign_bound_and_mask_of_a_kernel_and_nothing_of_its_host() -> None:
    mutants = list(mutation.triton_mutants(KERNEL))
    assert {mutant.function for mutant in mutants} == {"kernel"}
    assert sorted((mutant.kind, mutant.before) for mutant in mutants) == [
        ("bound", "at < n"),
        ("bound", "at < n"),
        ("bound", "x > 0"),
        ("mask", "at < n"),
        ("mask", "at < n"),
        ("mask", "x > 0"),
        ("sign", "-x"),
        ("sign", "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"),
        ("sign", "x -= 1"),
    ]
    for mutant in mutants:
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != KERNEL
        assert mutant.source.splitlines()[mutant.line - 1] != KERNEL.splitlines()[mutant.line - 1]


def test_signs_of_cpp() -> None:
    source = "int f(int a) {  // a + b\n  a += 1;\n  return a - 2 + a;\n}\n"
    mutants = list(mutation.cpp_mutants(source))
    assert [mutant.line for mutant in mutants] == [2, 3, 3]
    assert "a -= 1" in mutants[0].source
    assert "a + 2 + a" in mutants[1].source
    assert "a - 2 - a" in mutants[2].source


def test_a_few_take_each_kind_of_each_function() -> None:
    few = mutation.a_few(list(mutation.triton_mutants(KERNEL)))
    assert sorted(mutant.kind for mutant in few) == ["bound", "mask", "sign"]


def test_a_broken_kernel_runs_in_place_of_the_real_one() -> None:
    folder = mutation.folder_of(SAMPLES)
    sign = next(
        m
        for m in mutation.mutants_of(folder, "triton")
        if m.before.startswith("group * group_size")
    )

    def check() -> None:
        check_values(SAMPLES, SAMPLES.small[0], "triton", torch.float32)

    check()
    assert not mutation.survives(folder, "triton", sign, check)
    assert mutation.survives(folder, "triton", sign, lambda: None)
    check()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_the_kernel_as_it_is_survives_in_place_of_itself(backend: str) -> None:
    folder = mutation.folder_of(SAMPLES)
    mutant = mutation.mutants_of(folder, backend)[0]
    same = replace(mutant, source=(mutation._path(folder) / mutant.file).read_text())

    def check() -> None:
        check_values(SAMPLES, SAMPLES.small[0], backend, torch.float32)

    assert mutation.survives(folder, backend, same, check)


def test_a_kernel_beside_the_backends_file_is_broken_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "two_files"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "triton.py").write_text(
        "from two_files.triton_parts import parts\n\ndef run():\n    return parts.fn(3)\n"
    )
    (folder / "triton_parts.py").write_text(
        "import triton\n\n@triton.jit\ndef parts(n):\n    return n + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mutant,) = mutation.mutants_of("two_files", "triton")
    assert (mutant.file, mutant.function) == ("triton_parts.py", "parts")

    def check() -> None:
        assert ways._implementation("two_files", "triton", "run")() == 4

    check()
    assert not mutation.survives("two_files", "triton", mutant, check)
    assert mutation.survives(
        "two_files",
        "triton",
        replace(mutant, after="", source=(folder / "triton_parts.py").read_text()),
        check,
    )
    check()


def test_a_mutant_that_never_ends_was_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "_PATIENCE", 0.3)
    folder = mutation.folder_of(SAMPLES)
    mutant = mutation.mutants_of(folder, "triton")[0]

    def loop() -> None:
        while True:
            pass

    assert not mutation.survives(folder, "triton", mutant, loop)


def test_a_mutant_that_waits_for_ever_was_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "_STUCK", 1.0)
    folder = mutation.folder_of(SAMPLES)
    mutant = mutation.mutants_of(folder, "triton")[0]
    begin = time.monotonic()
    assert not mutation.survives(folder, "triton", mutant, lambda: time.sleep(60))
    assert time.monotonic() - begin < 30
