"""Compile one kernel for one architecture and read what came of it."""

import re
from dataclasses import dataclass
from typing import Any

from fivefold.kernels.errors import CompileError
from fivefold.kernels.offline import sass, tiles
from fivefold.kernels.offline.builds import Build, CudaBuild, FunctionName, TritonBuild
from fivefold.kernels.offline.tools import dump

# Targets with the number that Triton and the name that NVRTC know them by.
TARGETS = {"sm_80": (80, "sm_80"), "sm_90a": (90, "sm_90a"), "sm_100": (100, "sm_100a")}

_DOT = re.compile(r"tt\.dot(?:_scaled)?\b.*?: tensor<(?:\d+x)+(\w+)")
_WIDE_OPERANDS = {"f32", "f64", "tf32", "i32"}

# What Triton says of a dtype that an architecture has not.
_UNSUPPORTED = re.compile(r"not supported in this architecture|fp8e4nv.*not supported")


class UnsupportedError(CompileError):
    """An architecture lacks what a kernel is about, such as float8 on sm_80."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What is known of a kernel's machine code.

    Attributes:
        registers: of a thread.
        shared_bytes: of a block.
        code: what its instructions show.
        tile_load_bytes: that each thread loads if every tile that gives each of them at least 16
            bytes is shared out evenly; 0 where the kernel's source does not say.
        tile_store_bytes: the same of stores.
        has_dot: whether it multiplies matrices.
        has_narrow_dot: whether it does so with operands of at most 16 bits.
        compiler: name and version.
    """

    registers: int
    shared_bytes: int
    code: sass.MachineCode
    tile_load_bytes: int
    tile_store_bytes: int
    has_dot: bool
    has_narrow_dot: bool
    compiler: str


def compile_build(build: Build, target: str) -> Compiled:
    """Compile for one of ``TARGETS``.

    Raises:
        UnsupportedError: the target lacks what the kernel is about.
        CompileError: the kernel does not compile, with what the compiler said.
    """
    if isinstance(build, CudaBuild):
        return _compile_cuda(build, target)
    try:
        return _compile_triton(build, target)
    except CompileError:
        raise
    except Exception as error:  # the compilers raise whatever they like
        kind = UnsupportedError if _UNSUPPORTED.search(_whole(error)) else CompileError
        raise kind(f"{type(error).__name__}: {_whole(error)}") from error


def _compile_triton(build: TritonBuild, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    number, _ = TARGETS[target]
    source = triton.compiler.ASTSource(
        fn=build.function.resolve(),
        signature=dict(build.signature),
        constexprs={(index,): _resolved(value) for index, value in build.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in build.divisible},
    )
    made = triton.compile(source, target=GPUTarget("cuda", number, 32), options=dict(build.options))
    ttir = made.asm["ttir"]
    threads = 32 * made.metadata.num_warps
    operands = _DOT.findall(ttir)
    dumped = dump(made.asm["cubin"], made.name, number)
    return Compiled(
        registers=dumped.registers,
        shared_bytes=made.metadata.shared + dumped.static_shared_bytes,
        code=sass.read(dumped.listing),
        tile_load_bytes=tiles.bytes_of(ttir, "load", threads),
        tile_store_bytes=tiles.bytes_of(ttir, "store", threads),
        has_dot=bool(operands),
        has_narrow_dot=any(dtype not in _WIDE_OPERANDS for dtype in operands),
        compiler=f"triton {triton.__version__}",
    )


def _compile_cuda(build: CudaBuild, target: str) -> Compiled:
    from fivefold.kernels.cuda_route.compiler import version

    number, arch = TARGETS[target]
    dumped = dump(build.program.cubin(arch), build.kernel, number)
    code = sass.read(dumped.listing)
    return Compiled(
        registers=dumped.registers,
        shared_bytes=build.shared_bytes + dumped.static_shared_bytes,
        code=code,
        tile_load_bytes=0,
        tile_store_bytes=0,
        has_dot=bool(code.tensor_core),
        has_narrow_dot=bool(code.tensor_core),
        compiler=f"nvrtc {version()}",
    )


def _resolved(value: Any) -> Any:
    return value.resolve() if isinstance(value, FunctionName) else value


def _whole(error: BaseException) -> str:
    """What went wrong and what that came from: Triton names the line first and the reason last."""
    text = str(error).strip()
    cause = "" if error.__cause__ is None else _whole(error.__cause__)
    return text if cause in text else f"{text}\n{cause}"
