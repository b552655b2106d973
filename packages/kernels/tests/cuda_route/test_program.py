"""CUDA C++ compiled without a GPU."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from fivefold.kernels import BackendError, CompileError, cuda_route
from fivefold.kernels.cuda_route import compiler, program, store
from fivefold.kernels.offline.sass import read
from fivefold.kernels.offline.tools import dump

pytest.importorskip("cuda.core")

BARRIER = Path(__file__).with_name("barrier.cu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIVEFOLD_CACHE_DIR", str(tmp_path / "cache"))
    program._cubin.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    compiled = []
    compile_to_cubin = compiler.compile_to_cubin

    def counted(source: Path, settings: compiler.Settings) -> bytes:
        compiled.append(source)
        return compile_to_cubin(source, settings)

    monkeypatch.setattr(compiler, "compile_to_cubin", counted)
    return compiled


def source_of(folder: Path, text: str) -> cuda_route.Program:
    path = folder / "kernel.cu"
    path.write_text(text)
    return cuda_route.load(path)


@pytest.mark.parametrize(("arch", "number"), [("sm_80", 80), ("sm_90a", 90), ("sm_100a", 100)])
def test_a_grid_barrier_compiles_for_every_architecture(arch: str, number: int) -> None:
    pytest.importorskip("triton", reason="brings cuobjdump")
    found = dump(cuda_route.load(BARRIER).cubin(arch), "normalize", number)
    code = read(found.listing)
    assert 8 <= found.registers <= 64
    assert 0 < found.static_shared_bytes <= 16
    assert (code.load_bytes, code.store_bytes, code.spill_bytes) == (16, 16, 0)


def test_a_name_that_is_not_there() -> None:
    pytest.importorskip("triton", reason="brings cuobjdump")
    with pytest.raises(CompileError, match="no kernel nothing"):
        dump(cuda_route.load(BARRIER).cubin("sm_80"), "nothing", 80)


@pytest.mark.parametrize(
    "header",
    [
        "cuda_fp16.h",
        "cuda_bf16.h",
        "cuda_fp8.h",
        "cooperative_groups.h",
        "cuda/std/cstdint",
    ],
)
def test_headers_of_cuda_are_there(tmp_path: Path, header: str) -> None:
    from cuda import core

    if not compiler._bundles_headers(core) and len(compiler._header_folders()) < 2:
        pytest.skip("an older NVRTC without headers")
    kernel = f'#include <{header}>\nextern "C" __global__ void f(int* x) {{ *x = 1; }}\n'
    assert source_of(tmp_path, kernel).cubin("sm_90a").startswith(b"\x7fELF")


def test_what_the_compiler_says_is_in_the_error(tmp_path: Path) -> None:
    wrong = source_of(tmp_path, 'extern "C" __global__ void f(int* x) { *x = nowhere; }\n')
    with pytest.raises(CompileError) as caught:
        wrong.cubin("sm_90a")
    text = str(caught.value)
    assert text.startswith(f"NVRTC {compiler.version()} refuses {wrong.source} for sm_90a:")
    assert 'kernel.cu(1): error: identifier "nowhere" is undefined' in text
    assert "headers" not in text


def test_a_header_that_is_missing_is_named_with_the_wheels(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"<nowhere\.h> is not among .*nvidia-cuda-cccl"
    ) as caught:
        source_of(tmp_path, "#include <nowhere.h>\n").cubin("sm_90a")
    assert "fivefold-kernels[cuda]" in str(caught.value)


def test_an_architecture_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"for sm_13:[\s\S]*gpu-architecture"):
        cuda_route.load(BARRIER).cubin("sm_13")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"nowhere\.cu cannot be read"):
        cuda_route.load(tmp_path / "nowhere.cu").cubin("sm_80")


def test_without_cuda_core_the_extra_is_named() -> None:
    compiler._core.cache_clear()
    with (
        patch.dict("sys.modules", {"cuda.core": None}),
        pytest.raises(BackendError, match=r"fivefold-kernels\[cuda\]"),
    ):
        compiler._core()


def test_an_older_compiler_finds_headers_in_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import core, pathfinder

    monkeypatch.setattr(compiler, "_version", lambda: (13, 2))
    monkeypatch.setattr(
        pathfinder,
        "find_nvidia_header_directory",
        lambda name: {"cudart": "/wheels/include"}.get(name),
    )
    settings = compiler.Settings(arch="sm_80")
    options = compiler._options(core, BARRIER, settings)
    assert options.include_path == [str(BARRIER.parent), "/wheels/include"]
    assert not options.use_bundled_headers


def test_options_reach_the_compiler() -> None:
    from cuda import core

    settings = compiler.Settings(
        arch="sm_80", defines=(("SCALE", "2"),), max_registers=40, fast_math=True
    )
    options = [
        text.decode() for text in compiler._options(core, BARRIER, settings).as_bytes("nvrtc")
    ]
    assert {"-arch=sm_80", "--define-macro=SCALE=2", "--maxrregcount=40"} <= set(options)
    assert any("use_fast_math" in text for text in options)


def test_each_file_is_compiled_once(compilations: list[Path]) -> None:
    first = cuda_route.load(BARRIER).cubin("sm_80")
    assert cuda_route.load(BARRIER).cubin("sm_80") is first
    program._cubin.cache_clear()  # as another process
    assert cuda_route.load(BARRIER).cubin("sm_80") == first
    assert compilations == [BARRIER]


def test_all_that_decides_the_code_makes_another(compilations: list[Path]) -> None:
    load = cuda_route.load
    programs = [
        load(BARRIER),
        load(BARRIER, defines={"SCALE": 2}),
        load(BARRIER, max_registers=32),
        load(BARRIER, fast_math=True),
    ]
    for each in programs:
        each.cubin("sm_80")
    programs[0].cubin("sm_90a")
    assert len(compilations) == 5


def test_a_changed_header_makes_another(tmp_path: Path, compilations: list[Path]) -> None:
    (tmp_path / "value.cuh").write_text("#define VALUE 1\n")
    text = '#include "value.cuh"\nextern "C" __global__ void f(int* x) { *x = VALUE; }\n'
    one = source_of(tmp_path, text).cubin("sm_80")
    (tmp_path / "value.cuh").write_text("#define VALUE 2\n")
    program._cubin.cache_clear()
    assert source_of(tmp_path, text).cubin("sm_80") != one
    assert len(compilations) == 2


def test_another_compiler_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    name = store.name_of(BARRIER, "", compiler.version())
    assert name != store.name_of(BARRIER, "", "12.9")
    assert name.startswith("barrier-")


def test_a_file_that_was_cut_short_is_made_again(
    empty_cache: Path, compilations: list[Path]
) -> None:
    whole = cuda_route.load(BARRIER).cubin("sm_80")
    (kept,) = empty_cache.glob("*.cubin")
    kept.write_bytes(whole[:100])
    program._cubin.cache_clear()
    assert cuda_route.load(BARRIER).cubin("sm_80") == whole
    assert len(compilations) == 2
    assert kept.read_bytes() == whole


def test_a_full_disk_stops_nobody(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cuda_route.load(BARRIER).cubin("sm_80")
    assert not list(empty_cache.glob("*"))
