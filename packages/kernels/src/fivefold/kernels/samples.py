"""Calls of an op with everything that tests, offline compilation and benchmarks need of them.

Each op folder has a ``samples.py`` with one ``SAMPLES``; packages name the folder of their ops in
the entry point group ``fivefold.kernels``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


class Maker:
    """Makes the tensors of a sample; what it is set to decides dtype, device and memory.

    Args:
        dtype: of floating-point tensors that do not ask for another.
        device: ``meta`` makes tensors of no values.
        seed: of the values.
        allocate: makes the memory of a floating-point tensor of a shape, dtype and device; the
            test kit's allocators put NaN around and between the values.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        allocate: Callable[..., Tensor] | None = None,
    ):
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._allocate = torch.empty if allocate is None else allocate

    def normal(
        self, *shape: int, scale: float = 1.0, grad: bool = True, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Values of mean 0 and standard deviation ``scale``; a leaf with a gradient by default."""
        x = self._allocate(shape, dtype=dtype or self.dtype, device=self.device)
        if self.device != "meta":
            # In float64 and rounded, so that every dtype has the same values as near as it can.
            drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
            x.copy_(drawn * scale)
        return x.requires_grad_(grad)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Values from ``low`` to ``high - 1``."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        drawn = torch.randint(low, high, shape, generator=self._generator)
        return drawn.to(dtype=dtype, device=self.device)

    def booleans(self, *shape: int, true: float = 0.5) -> Tensor:
        """True with probability ``true``."""
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.bool, device="meta")
        return (torch.rand(shape, generator=self._generator) < true).to(self.device)

    def values(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """These values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The least work that an op can do: what the roofline is computed from.

    Attributes:
        bytes: read and written, each value once.
        flops: additions and multiplications on tensor cores; 0 for ops that memory bounds.
    """

    bytes: int
    flops: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One call of an op.

    Attributes:
        name: what is special about it.
        inputs: the keyword arguments, given a ``Maker``.
        dtypes: the dtypes it makes sense in; None means those of its ``OpSamples``.
    """

    name: str
    inputs: Callable[[Maker], Inputs]
    dtypes: tuple[torch.dtype, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another library's form of an op, to compare with.

    Attributes:
        name: of the library.
        function: takes a sample's inputs; imports the library inside.
        takes: whether it can run given inputs.
    """

    name: str
    function: Callable[..., Any]
    takes: Callable[[Inputs], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSamples:
    """All samples of one op.

    Attributes:
        name: of the op's folder.
        function: the public function; takes a sample's inputs and ``backend``.
        eager: what a user of torch alone writes; takes a sample's inputs.
        small: odd and empty sizes, for tests: no more than a few thousand values, since the
            interpreter is slow. The first is a usual call.
        real: sizes of models, for machine code and benchmarks on a GPU.
        laptop: sizes for benchmarks on a CPU, of a few milliseconds.
        cost: of forward and of backward, given a sample's inputs.
        peers: of the benchmark.
        dtypes: what the tests run.
        real_dtypes: what benchmarks on a GPU and offline compilation run.
        tensor_cores: whether its kernels must use tensor cores in ``real_dtypes``; if not, memory
            bounds them and they must load and store 16 bytes at once.
        follows_indices: whether memory bounds it, but single values that indices point at, as of
            sparse matrices: then accesses cannot be wide.
        rounds_to: the coarsest dtype that the op computes in, if that is coarser than its inputs:
            what benchmarks compare with may differ by so much.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    small: tuple[Sample, ...]
    real: tuple[Sample, ...]
    laptop: tuple[Sample, ...]
    cost: Callable[[Inputs], tuple[Cost, Cost]]
    peers: tuple[Peer, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
    real_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    tensor_cores: bool = False
    follows_indices: bool = False
    rounds_to: torch.dtype | None = None


def load(op: str, package: str = "kernels") -> OpSamples:
    """The samples of one op of an installed package.

    Raises:
        KeyError: no such op, with the ops there are.
    """
    found = {(samples_package, name): module for samples_package, name, module in modules()}
    if (package, op) not in found:
        names = sorted(f"{each[0]}/{each[1]}" for each in found)
        raise KeyError(f"there is no op {package}/{op}; there are {', '.join(names)}")
    return _samples(found[package, op])


def installed() -> Iterator[tuple[str, OpSamples]]:
    """Package and samples of every op of every installed package."""
    for package, _, module in modules():
        yield package, _samples(module)


def modules() -> Iterator[tuple[str, str, str]]:
    """Package, name and samples module of every op of every installed package."""
    for entry in sorted(entry_points(group="fivefold.kernels")):
        folder = import_module(entry.value)
        for found in iter_modules(folder.__path__):
            if found.ispkg:
                yield entry.name, found.name, f"{entry.value}.{found.name}.samples"


def _samples(module: str) -> OpSamples:
    samples: OpSamples = import_module(module).SAMPLES
    return samples
