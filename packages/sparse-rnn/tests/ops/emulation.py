"""Run the persistent kernel's own text on the CPU, see emulated.h."""

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from fivefold.kernels import native
from fivefold.kernels.cuda_route import Program
from fivefold.sparse_rnn import arrangement
from fivefold.sparse_rnn.ops.recurrence import cuda

HERE = Path(__file__).parent
ERRORS = {1: "all wait for each other", 2: "they wait without end", 3: "beyond shared memory"}

_KERNEL = re.compile(r"GPU_KERNEL (\w+)\(([^)]*)\)")


class EmulationError(Exception):
    """A grid that did not come to an end."""


class Emulator:
    """Compiles kernels for the CPU and starts them.

    Args:
        folder: for what is compiled.
        num_sms: of the GPU that is played.
        num_warps: of a block.
        changes: texts of the kernel's files to put others in place of.
        seed: of the order in which threads run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_sms: int = 3,
        num_warps: int = 2,
        changes: Sequence[tuple[str, str]] = (),
        seed: int = 0,
    ):
        self.folder, self.num_sms, self.num_warps = folder, num_sms, num_warps
        self.changes, self.seed = changes, seed
        self.launches: list[str] = []
        self.words: list[Tensor] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the backend start kernels here."""
        told = torch.zeros(1, dtype=torch.int32)
        cuda._resident.clear()
        with (
            patch.object(cuda.cuda_route, "launch", self.launch),
            patch.object(cuda, "num_sms", lambda _: self.num_sms),
            patch.object(cuda, "NUM_WARPS", self.num_warps),
            # As many blocks as there are, however little there is to do.
            patch.object(arrangement, "_SLOTS_OF_WARP", 1),
            patch.object(cuda, "_told", lambda _: told),
        ):
            yield

    def launch(
        self,
        program: Program,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: Tensor | float | None,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """What ``cuda_route.launch`` does on a GPU."""
        if 0 in grid:
            return
        self.launches.append(kernel)
        library = native.load(self._source(program))
        status = torch.zeros(1, dtype=torch.int64)
        run = getattr(library, f"run_{kernel}")
        # The arguments of kernels are of eight bytes, None the null pointer.
        native.call(run, status, grid[0], block[0], shared_bytes, self.seed, *arguments)
        if status.item():
            raise EmulationError(ERRORS[int(status)])
        if kernel == "recurrence_pack":
            words = arguments[3]
            assert isinstance(words, Tensor)
            self.words.append(words)

    def _source(self, program: Program) -> Path:
        text = program.source.read_text()
        for before, after in self.changes:
            assert text.count(before) <= 1, f"{before!r} is there more than once"
            text = text.replace(before, after)
        text = text.replace('#include "gpu.h"', "")
        defines = "".join(f"#define {name} {value}\n" for name, value in program.defines)
        entries = "".join(map(_entry, _KERNEL.findall(_active(text, dict(program.defines)))))
        heads = f'#include "{HERE / "emulated.h"}"\n'
        whole = f'#pragma GCC optimize("O1")\n{heads}{defines}{text}\n{entries}'
        # Of one text one name, so that what is compiled is found again.
        path = self.folder / f"emulated_{zlib.crc32(whole.encode()):x}.cpp"
        path.write_text(whole)
        return path


def _active(text: str, defines: dict[str, str]) -> str:
    """Without the kernels that the preprocessor takes away."""
    before, _, rest = text.partition("#if BACKWARD")
    first, _, second = rest.partition("#else")
    return before + (first if defines.get("BACKWARD") == "1" else second)


def _entry(kernel: tuple[str, str]) -> str:
    """A function of the library that runs a grid of a kernel."""
    name, parameters = kernel
    names = [each.split()[-1].lstrip("*") for each in parameters.split(",")]
    return (
        f'extern "C" __attribute__((visibility("default"))) '
        f"void run_{name}(int64_t* status, int64_t blocks, int64_t threads, "
        f"int64_t shared_bytes, int64_t seed, {parameters}) {{\n"
        f"  *status = emulated::launch(blocks, threads, shared_bytes, seed, [=] {{\n"
        f"    {name}({', '.join(names)});\n  }});\n}}\n"
    )
