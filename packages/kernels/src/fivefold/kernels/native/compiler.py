"""The C++ compiler of this machine, and how it is called."""

import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from fivefold.kernels.errors import CompileError

# Sums keep their order and NaN, infinities and signed zeros their meaning: of what -ffast-math
# allows, only what changes no value. -fopenmp-simd understands "#pragma omp simd" and links no
# OpenMP runtime, which would fight torch's.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wno-psabi",
)
INCLUDES = Path(__file__).parent

# A file takes seconds; on a machine that swaps it may take minutes.
TIMEOUT_SECONDS = 300.0

Compiler = tuple[str, ...]


def find() -> Compiler | None:
    """The command of the compiler: ``CXX``, else the first of g++, clang++ and c++ on the path."""
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def version(compiler: Compiler) -> str:
    """What the compiler says of itself.

    Raises:
        CompileError: it does not run.
    """
    return _version(compiler)


def build(compiler: Compiler, source: Path, library: Path) -> None:
    """Compile a C++ file into a shared library.

    Raises:
        CompileError: the compiler refused or did not come back, with the command and its output.
    """
    _run((*compiler, *FLAGS, f"-I{INCLUDES}", str(source.resolve()), "-o", str(library)))


@cache
def _find(asked: str, path: str) -> Compiler | None:
    for command in (asked,) if asked.strip() else ("g++", "clang++", "c++"):
        words = shlex.split(command)
        found = shutil.which(words[0], path=path)
        if found is not None:
            return (found, *words[1:])
    return None


@cache
def _version(compiler: Compiler) -> str:
    return _run((*compiler, "--version"))


def _run(command: Compiler) -> str:
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{shown}\ndid not end within {TIMEOUT_SECONDS:.0f} s") from error
    except OSError as error:
        raise CompileError(f"{shown}\ncannot be started: {error}") from error
    if done.returncode:
        raise CompileError(f"{shown}\nended with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout
