"""C++ files become libraries: once, whoever asks first, and with a clear word where they cannot."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fivefold.kernels import native
from fivefold.kernels.backends import missing
from fivefold.kernels.errors import BackendError, CompileError, KernelInputError
from fivefold.kernels.native import cache, compiler
from fivefold.kernels.ops.rms_norm import cpu as rms_norm_cpu
from fivefold.kernels.ops.rms_norm import rms_norm

TWICE = """
#include "fivefold.h"
FIVEFOLD_API void scale(const float* x, float* y, int64_t n, double by, int64_t num_threads) {
  fivefold::parallel_for(0, n, 1, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t i = from; i < to; ++i) y[i] = by * x[i];
  });
}
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    native.load.cache_clear()
    native.refusal.cache_clear()
    yield
    native.load.cache_clear()
    native.refusal.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "twice.cpp"
    path.write_text(TWICE)
    return path


def _run(source: Path, threads: int = 1) -> list[float]:
    x, y = torch.arange(5.0), torch.empty(5)
    native.call(native.load(source).scale, x, y, 5, 2.0, threads)
    return y.tolist()


def _libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.so"))


def _script(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_compiles_once_and_then_finds_it(source: Path, tmp_path: Path, monkeypatch) -> None:
    assert _run(source) == [0, 2, 4, 6, 8]
    (made,) = _libraries(tmp_path)
    native.load.cache_clear()
    monkeypatch.setattr(compiler, "build", lambda *_: pytest.fail("compiled again"))
    assert _run(source) == [0, 2, 4, 6, 8]
    assert _libraries(tmp_path) == [made]


def test_source_headers_and_flags_make_another_library(source: Path, monkeypatch) -> None:
    names = [cache.inputs_name(source)]
    source.write_text(TWICE + '#include "mine.h"\n')
    names.append(cache.inputs_name(source))
    (source.parent / "mine.h").write_text('#include "deeper.h"\n')
    names.append(cache.inputs_name(source))
    (source.parent / "deeper.h").write_text('#include "mine.h"\n')
    names.append(cache.inputs_name(source))
    (source.parent / "fivefold.h").write_text("")
    names.append(cache.inputs_name(source))
    monkeypatch.setattr(cache, "FLAGS", ("-O0",))
    names.append(cache.inputs_name(source))
    monkeypatch.setattr(cache, "_cpu", lambda: "another")
    names.append(cache.inputs_name(source))
    assert len(set(names)) == len(names)
    assert cache.compiler_name("g++ 12") != cache.compiler_name("g++ 13")


def test_six_processes_start_at_once(source: Path, tmp_path: Path, monkeypatch) -> None:
    counter = tmp_path / "compiled"
    real = " ".join(compiler.find() or pytest.fail("no compiler"))
    text = (
        f'case "$*" in *--version*) ;; *) echo x >> {counter}; sleep 0.3;; esac\nexec {real} "$@"'
    )
    monkeypatch.setenv("CXX", _script(tmp_path, "cxx", text))
    context = multiprocessing.get_context("fork")
    gate, results = context.Event(), context.Queue()

    def start() -> None:
        gate.wait()
        results.put(_run(source, threads=2))

    children = [context.Process(target=start) for _ in range(6)]
    for child in children:
        child.start()
    gate.set()
    assert [results.get(timeout=60) for _ in children] == [[0, 2, 4, 6, 8]] * 6
    for child in children:
        child.join()
    assert counter.read_text() == "x\n"
    assert len(_libraries(tmp_path)) == 1


def test_a_process_killed_half_way_leaves_the_turn_to_others(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    started = tmp_path / "started"
    text = f'case "$*" in *--version*) echo v;; *) touch {started}; exec sleep 60;; esac'
    slow = _script(tmp_path, "slow", text)
    code = (
        "from pathlib import Path; from fivefold.kernels import native; "
        f"native.load(Path({str(source)!r}))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"CXX": slow}, start_new_session=True
    )
    while not started.exists():
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert _libraries(tmp_path) == [] or all(
        each.name.startswith(".") for each in _libraries(tmp_path)
    )
    begin = time.monotonic()
    assert _run(source) == [0, 2, 4, 6, 8]
    assert time.monotonic() - begin < 30


def test_what_a_killed_compiler_left_is_swept(source: Path, tmp_path: Path) -> None:
    _run(source)
    (made,) = _libraries(tmp_path)
    prefix = made.stem.rpartition("-")[0]
    old, new = (made.parent / f".{prefix}.{name}.so" for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    made.unlink()
    native.load.cache_clear()
    _run(source)
    assert not old.exists() and new.exists()


def test_a_turn_waits_for_the_one_before_and_not_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    begin = time.monotonic()
    with cache.turn(tmp_path, "name"), cache.turn(tmp_path, "name"):
        waited = time.monotonic() - begin
    assert 0.2 <= waited < 5
    begin = time.monotonic()
    with cache.turn(tmp_path, "name"):
        assert time.monotonic() - begin < 0.2


def test_a_broken_file_is_made_again(source: Path, tmp_path: Path) -> None:
    _run(source)
    (made,) = _libraries(tmp_path)
    whole = made.read_bytes()
    made.unlink()  # not cut short in place: this process has it in its memory
    made.write_bytes(whole[: len(whole) // 2])
    native.load.cache_clear()
    assert _run(source) == [0, 2, 4, 6, 8]
    assert made.read_bytes() == whole


def test_a_file_that_cannot_be_loaded_is_made_again(source: Path, tmp_path: Path) -> None:
    _run(source)
    (made,) = _libraries(tmp_path)
    made.unlink()
    foreign = b"for another system"
    scratch = tmp_path / "foreign"
    scratch.write_bytes(foreign)
    name = f"{made.stem.rpartition('-')[0]}-{cache.content_name(scratch)}.so"
    made.with_name(name).write_bytes(foreign)
    native.load.cache_clear()
    assert _run(source) == [0, 2, 4, 6, 8]


def test_without_a_compiler(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.find() is None
    assert "no C++ compiler: install g++" in (missing("cpu", "cpu") or "")
    with pytest.raises(CompileError, match=r"twice.cpp is not compiled yet and there is no C\+\+"):
        native.load(source)
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unasked = rms_norm(x, (8,))
    assert torch.equal(unasked, rms_norm(x, (8,), backend="reference"))
    with pytest.raises(BackendError, match="asked to run on 'cpu': there is no C"):
        rms_norm(x, (8,), backend="cpu")


def test_without_a_compiler_but_with_a_full_cache(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    _run(source)
    native.load.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing("cpu", "cpu") is None
    assert _run(source) == [0, 2, 4, 6, 8]


def test_a_failing_compiler_is_one_warning_and_an_error_when_asked(
    tmp_path: Path, monkeypatch
) -> None:
    text = 'case "$*" in *--version*) echo v;; *) echo no such luck >&2; exit 3;; esac'
    monkeypatch.setenv("CXX", _script(tmp_path, "cxx", text))
    x = torch.randn(3, 8)
    expected = rms_norm(x, (8,), backend="reference")
    with pytest.warns(RuntimeWarning, match=r"(?s)cpu.cpp could not be compiled.*no such luck"):
        assert torch.equal(rms_norm(x, (8,)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rms_norm(x, (8,)), expected)
        with pytest.raises(
            BackendError, match=r"(?s)asked to run on 'cpu'.*ended with 3:\nno such"
        ):
            rms_norm(x, (8,), backend="cpu")
    with pytest.raises(CompileError, match="no such luck"):
        native.load(rms_norm_cpu.SOURCE)
    assert list((tmp_path / "cache").glob(".*")) == []


def test_a_mistake_in_a_file_shows_what_the_compiler_said(source: Path) -> None:
    source.write_text("int main( {")
    with pytest.raises(CompileError, match=r"(?s)-O3.*twice\.cpp.*error"):
        native.load(source)


def test_compilers_that_hang_or_cannot_start(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT_SECONDS", 0.2)
    text = 'case "$*" in *--version*) echo v;; *) exec sleep 60;; esac'
    monkeypatch.setenv("CXX", _script(tmp_path, "hangs", text))
    with pytest.raises(CompileError, match="did not end within 0 s"):
        native.load(source)
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompileError, match="cannot be started"):
        native.load(source)


def test_cxx_may_have_arguments_and_must_be_there(source: Path, monkeypatch) -> None:
    found = compiler.find()
    assert found is not None
    monkeypatch.setenv("CXX", f"{found[0]} -DX='a b'")
    assert compiler.find() == (found[0], "-DX=a b")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler.find() is None


def test_a_folder_that_cannot_be_written_to(source: Path, tmp_path: Path, monkeypatch) -> None:
    # A file where the folder should be: root may write to any folder.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIVEFOLD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert _run(source) == [0, 2, 4, 6, 8]
    (made,) = (tmp_path / "tmp").glob("fivefold-*/twice-*.so")
    native.load.cache_clear()
    monkeypatch.setattr(compiler, "build", lambda *_: pytest.fail("compiled again"))
    assert _run(source) == [0, 2, 4, 6, 8]
    # Others may have made it: then it is nobody's.
    native.load.cache_clear()
    made.parent.chmod(0o777)
    with pytest.raises(pytest.fail.Exception):
        _run(source)


def test_a_full_read_only_cache_is_read(source: Path, tmp_path: Path, monkeypatch) -> None:
    _run(source)
    native.load.cache_clear()
    monkeypatch.setattr(cache, "writable_folder", lambda: pytest.fail("nothing to write"))
    assert _run(source) == [0, 2, 4, 6, 8]


def test_the_folder_of_the_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE_DIR", "/asked")
    assert next(cache.folders()) == Path("/asked")
    monkeypatch.delenv("FIVEFOLD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert next(cache.folders()) == Path("/xdg/fivefold")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert next(cache.folders()) == Path("/home/me/.cache/fivefold")


def test_runs_after_a_fork_that_came_amid_use(source: Path) -> None:
    assert _run(source, threads=3) == [0, 2, 4, 6, 8]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=lambda: results.put(_run(source, threads=3))) for _ in range(2)
    ]
    for child in children:
        child.start()
        assert results.get(timeout=30) == [0, 2, 4, 6, 8]
        child.join(30)
        assert child.exitcode == 0
    assert _run(source, threads=3) == [0, 2, 4, 6, 8]


def test_tensors_elsewhere_are_refused(source: Path) -> None:
    with pytest.raises(KernelInputError, match="found one on meta"):
        native.call(native.load(source).scale, torch.empty(1, device="meta"), None, 1, 2.0, 1)


def test_a_gpu_has_no_use_for_it() -> None:
    assert missing("cpu", "cuda") == "it runs tensors of the CPU, these are on cuda"
