"""NVRTC through ``cuda.core``: CUDA C++ to machine code for any architecture, without a GPU."""

import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fivefold.kernels.errors import BackendError, CompileError

# The oldest NVRTC that brings its own headers.
_BUNDLES_HEADERS = (13, 3)

_MISSING_HEADER = re.compile(r'open source file "([^"]+)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a file is compiled with.

    Attributes:
        arch: such as ``sm_90a``.
        defines: macros and their values.
        max_registers: of a thread; None leaves it to the compiler.
        fast_math: approximate division, roots and exponentials, and flush subnormals to zero.
    """

    arch: str
    defines: tuple[tuple[str, str], ...] = ()
    max_registers: int | None = None
    fast_math: bool = False


@cache
def version() -> str:
    """Of NVRTC, as ``13.5``.

    Raises:
        BackendError: it is not installed.
    """
    return ".".join(map(str, _version()))


def compile_to_cubin(source: Path, settings: Settings) -> bytes:
    """The machine code of a file.

    Raises:
        BackendError: NVRTC is not installed.
        CompileError: NVRTC refuses the file, with what it said.
    """
    core = _core()
    try:
        text = source.read_text()
        program = core.Program(text, "c++", _options(core, source, settings))
        return bytes(program.compile("cubin").code)
    except OSError as error:
        raise CompileError(f"{source} cannot be read: {error}") from error
    except Exception as error:
        # cuda.core raises a class of its own that it does not export.
        if "NVRTC" not in f"{type(error).__name__} {error}":
            raise
        raise CompileError(_explained(source, settings, str(error))) from error


def _options(core: Any, source: Path, settings: Settings) -> Any:
    options: dict[str, Any] = {
        "name": source.name,
        "arch": settings.arch,
        "std": "c++17",
        "include_path": [str(source.parent)],
        "max_register_count": settings.max_registers,
        "use_fast_math": settings.fast_math or None,
    }
    if settings.defines:
        options["define_macro"] = list(settings.defines)
    if _bundles_headers(core):
        options["use_bundled_headers"] = True
    else:
        options["include_path"] += _header_folders()
    return core.ProgramOptions(**options)


def _bundles_headers(core: Any) -> bool:
    known = {field.name for field in fields(core.ProgramOptions)}
    return "use_bundled_headers" in known and _version() >= _BUNDLES_HEADERS


def _header_folders() -> list[str]:
    """Headers of the CUDA runtime and of CCCL, from wheels or a toolkit, those that are here."""
    from cuda import pathfinder

    found = [pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
    return [folder for folder in found if folder is not None]


def _explained(source: Path, settings: Settings, log: str) -> str:
    text = f"NVRTC {version()} refuses {source} for {settings.arch}:\n{log.strip()}"
    missing = _MISSING_HEADER.search(log)
    if missing is not None and not (source.parent / missing[1]).exists():
        text += (
            f"\n<{missing[1]}> is not among the headers found. NVRTC 13.3 and newer bring those of "
            'CUDA: pip install -U "fivefold-kernels[cuda]"; for an older one: '
            "pip install nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    return text


@cache
def _version() -> tuple[int, int]:
    _core()
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


@cache
def _core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise BackendError(
            'CUDA C++ kernels need cuda.core: pip install "fivefold-kernels[cuda]"'
        ) from error
    return cuda.core
