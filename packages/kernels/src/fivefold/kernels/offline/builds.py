"""What to compile: all that decides a kernel's machine code, in values that go to other processes.

A launch is turned into the signature that Triton itself would derive from it on a GPU, where fresh
tensors begin at multiples of 16 bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from fivefold.kernels.cuda_route.program import Program
from fivefold.kernels.errors import CompileError
from fivefold.kernels.launch import FUSED_MULTIPLY_ADD, CudaLaunch, Launch

# Pointers and sizes that are multiples of it allow accesses of 16 bytes.
_DIVISOR = 16


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A ``triton.jit`` function by the module and the name that it has there."""

    module: str
    name: str

    def resolve(self) -> Any:
        """The function itself."""
        return getattr(import_module(self.module), self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonBuild:
    """A Triton kernel with its signature.

    Attributes:
        function: the kernel.
        signature: name and type of every parameter, ``constexpr`` for constants.
        constants: position and value of those.
        divisible: positions of parameters that are multiples of 16.
        options: of the compiler, by name.
    """

    function: FunctionName
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.function.name


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaBuild:
    """A kernel of a CUDA C++ file.

    Attributes:
        program: the file with its options.
        kernel: the kernel's name.
        options: ``num_warps`` of a block.
        shared_bytes: the largest dynamic shared memory that it is started with.
    """

    program: Program
    kernel: str
    options: tuple[tuple[str, Any], ...]
    shared_bytes: int


Build = TritonBuild | CudaBuild


def build_of(launch: Launch | CudaLaunch) -> Build:
    """What a launch needs compiled.

    Raises:
        CompileError: the kernel is not a name of its module, or an argument has no type there.
    """
    if isinstance(launch, CudaLaunch):
        threads = 1
        for size in launch.block:
            threads *= size
        return CudaBuild(
            program=launch.program,
            kernel=launch.kernel,
            options=(("num_warps", -(-threads // 32)),),
            shared_bytes=launch.shared_bytes,
        )
    return _triton_build(launch)


def moved_bytes(launch: Launch | CudaLaunch) -> int:
    """Bytes of the tensors that a launch takes: what it reads and writes at most once each."""
    tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def _triton_build(launch: Launch) -> TritonBuild:
    rest = dict(launch.constants)
    signature, constants, divisible = [], [], []
    for index, (parameter, value) in enumerate(_bound(launch, rest)):
        type_name = "constexpr" if parameter.is_constexpr else _type(parameter, value)
        signature.append((parameter.name, type_name))
        if type_name == "constexpr":
            constants.append((index, _sendable(value)))
        elif _is_divisible(parameter, value):
            divisible.append(index)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options |= {"enable_fp_fusion": FUSED_MULTIPLY_ADD, **rest}
    return TritonBuild(
        function=_name_of(launch.kernel),
        signature=tuple(signature),
        constants=tuple(constants),
        divisible=tuple(divisible),
        options=tuple(options.items()),
    )


def _bound(launch: Launch, rest: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Parameters with their values; takes out of ``rest`` what is none of the compiler's."""
    positional = iter(launch.arguments)
    for parameter in launch.kernel.params:
        if parameter.name in rest:
            yield parameter, rest.pop(parameter.name)
        elif parameter.is_constexpr and parameter.has_default:
            yield parameter, parameter.default
        else:
            yield parameter, next(positional)


def _type(parameter: Any, value: Any) -> str:
    from triton.runtime.jit import mangle_type

    if parameter.annotation_type:
        return str(parameter.annotation_type)
    try:
        return str(mangle_type(value, not parameter.do_not_specialize))
    except TypeError as error:
        raise CompileError(f"parameter {parameter.name} has no type: {error}") from error


def _is_divisible(parameter: Any, value: Any) -> bool:
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    if isinstance(value, Tensor):
        # Of a view into fresh memory; a meta tensor's own pointer is 0.
        return value.storage_offset() * value.element_size() % _DIVISOR == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % _DIVISOR == 0


def _sendable(value: Any) -> Any:
    """A constant as it goes to another process: functions by their names."""
    return _name_of(value) if hasattr(value, "params") else value


def _name_of(kernel: Any) -> FunctionName:
    name = FunctionName(kernel.fn.__module__, kernel.fn.__qualname__)
    if "." in name.name:
        raise CompileError(f"{name.name} of {name.module} has to be a name of its module")
    return name
