"""A CUDA C++ file with the options that it is compiled with."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fivefold.kernels.cuda_route import compiler, store


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A file and options, compiled once for each architecture. Made by ``load``.

    Attributes:
        source: the file.
        defines: macros and their values.
        max_registers: of a thread; None leaves it to the compiler.
        fast_math: approximate division, roots and exponentials, and flush subnormals to zero.
    """

    source: Path
    defines: tuple[tuple[str, str], ...] = ()
    max_registers: int | None = None
    fast_math: bool = False

    def cubin(self, arch: str) -> bytes:
        """The machine code for an architecture such as ``sm_90a``, which need not be here.

        Raises:
            CompileError: NVRTC refuses the file, with what it said.
        """
        return _cubin(self, arch)


def load(
    source: Path,
    *,
    defines: Mapping[str, int | str] | None = None,
    max_registers: int | None = None,
    fast_math: bool = False,
) -> Program:
    """A CUDA C++ file as a program. Nothing is compiled before it is needed.

    Args:
        source: the file; it may include files beside it by a quoted name.
        defines: macros and their values.
        max_registers: of a thread; the default leaves it to the compiler.
        fast_math: see ``Program``.
    """
    pairs = tuple(sorted((name, str(value)) for name, value in (defines or {}).items()))
    return Program(
        source=source.resolve(), defines=pairs, max_registers=max_registers, fast_math=fast_math
    )


@cache
def _cubin(program: Program, arch: str) -> bytes:
    settings = compiler.Settings(
        arch=arch,
        defines=program.defines,
        max_registers=program.max_registers,
        fast_math=program.fast_math,
    )
    name = store.name_of(program.source, repr(settings), compiler.version())
    found = store.read(name)
    if found is None:
        found = compiler.compile_to_cubin(program.source, settings)
        store.write(name, found)
    return found
