"""Compile a C++ file or find it compiled, load it, and call into it."""

import ctypes
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fivefold.kernels.errors import CompileError, KernelInputError
from fivefold.kernels.native import cache as kept
from fivefold.kernels.native import compiler

_NO_COMPILER = "there is no C++ compiler: install g++ or clang++, or name one in CXX"


@cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ file, compiled now if it is not in the cache.

    Safe to call from several threads and processes at once, and before and after a fork. Calls
    into the library release the GIL.

    Args:
        source: the file, which may include ``fivefold.h`` and headers beside it.

    Raises:
        CompileError: there is no compiler, or it refuses the file, with what it said.
    """
    inputs = kept.inputs_name(source)
    command = compiler.find()
    if command is None:
        prefix = inputs
    else:
        prefix = f"{inputs}-{kept.compiler_name(compiler.version(command))}"
    library = _open_kept(prefix)
    if library is None:
        if command is None:
            raise CompileError(f"{source.name} is not compiled yet and {_NO_COMPILER}")
        library = _build(command, source, prefix)
    return library


def missing() -> str | None:
    """Why no C++ file at all can be had here; None where there is a compiler or a full cache."""
    if compiler.find() is None and not kept.any_library():
        return _NO_COMPILER
    return None


@cache
def refusal(source: Path) -> str | None:
    """Why a file cannot be compiled here; None where ``load`` gives its library.

    A compiler that is there and fails is worth one warning, since kernels then run slowly.
    It is asked once in a process.
    """
    try:
        load(source)
    except CompileError as error:
        if compiler.find() is not None:
            warnings.warn(
                f"{source.name} could not be compiled; its ops run on other backends:\n{error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return str(error)
    return None


def call(function: Any, *arguments: Tensor | float | None) -> None:
    """Call an entry point of a library: tensors as pointers, None as the null pointer.

    An ``int`` or ``bool`` becomes ``int64_t`` and a ``float`` ``double``, as the first call of the
    function has them. It learns sizes and strides from nowhere else, so pass what it needs.

    Raises:
        KernelInputError: a tensor is not in the memory of the CPU.
    """
    if function.argtypes is None:
        function.restype = None
        function.argtypes = [_type(each) for each in arguments]
    function(*[_pointer(each) if isinstance(each, Tensor) else each for each in arguments])


def _open_kept(prefix: str) -> ctypes.CDLL | None:
    for path in kept.find(prefix):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # made for a system with other libraries
            continue
    return None


def _build(command: compiler.Compiler, source: Path, prefix: str) -> ctypes.CDLL:
    folder = kept.writable_folder()
    with kept.turn(folder, prefix):
        library = _open_kept(prefix)  # made by whoever had the turn before
        if library is not None:
            return library
        kept.sweep(folder, prefix)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{prefix}.", suffix=".so")
        os.close(descriptor)
        try:
            compiler.build(command, source, Path(name))
            path = folder / f"{prefix}-{kept.content_name(Path(name))}.so"
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        return _open(path, command)


def _open(path: Path, command: compiler.Compiler) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"what {' '.join(command)} made cannot be loaded: {error}") from error


def _type(value: Tensor | float | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(value, float) else ctypes.c_int64


def _pointer(x: Tensor) -> int:
    if not x.is_cpu:
        raise KernelInputError(f"C++ kernels take tensors of the CPU, found one on {x.device}")
    return x.data_ptr()
