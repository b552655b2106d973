"""NVIDIA's ``cuobjdump``, which comes with Triton or with a CUDA toolkit."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fivefold.kernels.errors import BackendError, CompileError

_USAGE = re.compile(r"^\s*Function (\S+):\s*\n\s*(.*)$", re.MULTILINE)

# The system keeps so much of a block's shared memory from sm_90 on, and counts it as the kernel's.
_SYSTEM_SHARED_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """What a cubin says of one kernel.

    Attributes:
        registers: of a thread.
        static_shared_bytes: of a block, besides what it is started with.
        listing: its instructions.
    """

    registers: int
    static_shared_bytes: int
    listing: str


def dump(cubin: bytes, kernel: str, arch: int) -> Dump:
    """Look at one kernel of a cubin.

    Args:
        cubin: the file's content.
        kernel: the kernel's name.
        arch: the architecture, such as 90.

    Raises:
        BackendError: there is no ``cuobjdump``.
        CompileError: it finds no such kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _resources(_run("-res-usage", file.name), kernel)
        listing = _run("-sass", "-fun", kernel, file.name)
    system = _SYSTEM_SHARED_BYTES if arch >= 90 else 0
    return Dump(
        registers=usage["REG"],
        static_shared_bytes=max(0, usage["SHARED"] - system),
        listing=listing,
    )


def _resources(text: str, kernel: str) -> dict[str, int]:
    for name, usage in _USAGE.findall(text):
        if name == kernel:
            pairs = (pair.rpartition(":") for pair in usage.split())
            return {what: int(number) for what, _, number in pairs}
    raise CompileError(f"the machine code has no kernel {kernel}")


def _run(*arguments: str) -> str:
    command = [_cuobjdump(), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise CompileError(f"cuobjdump failed: {finished.stderr.strip() or finished.stdout}")
    return finished.stdout


@cache
def _cuobjdump() -> str:
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if brought.exists():
            return str(brought)
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        raise BackendError(
            "reading machine code needs cuobjdump, which comes with Triton: "
            'pip install "fivefold-kernels[triton]"'
        )
    return on_path
