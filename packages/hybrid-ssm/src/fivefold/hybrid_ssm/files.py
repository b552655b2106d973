"""Reading a model's parameters from its files slice by slice, and writing them one by one."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridWeightsError
from fivefold.hybrid_ssm.hf import EMBEDDING, KEPT, OLD_EMBEDDING, SCALES, Stored, stored_tensors
from fivefold.parallel_core.box import Box
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.parallel_core.parameters import Piece

FP8 = torch.float8_e4m3fn
BIAS = "router.bias"
"""End of the name of a buffer that files have too."""


class ModelFiles:
    """A model's tensors on disk, with scales applied where they are quantised.

    Args:
        reader: the open folder.
    """

    def __init__(self, reader: SafetensorsReader):
        self.reader = reader

    def _disk(self, name: str) -> str:
        old = name == EMBEDDING and name not in self.reader and OLD_EMBEDDING in self.reader
        return OLD_EMBEDDING if old else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.reader.shape(self._disk(name))

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor once its scale is applied: bfloat16 for float8."""
        dtype = self.reader.dtype(self._disk(name))
        return torch.bfloat16 if dtype == FP8 else dtype

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a rectangle of it; to copy from, never to write to.

        Raises:
            CheckpointError: no such tensor, or a quantised one without its scale.
        """
        piece = self.reader.view(self._disk(name), slices)
        if piece.dtype != FP8:
            return piece
        scale = self._scale(name)
        return piece.to(torch.float32) * scale

    def _scale(self, name: str) -> Tensor:
        key = f"{name.removesuffix('.weight')}.weight_scale"
        if key not in self.reader:
            raise HybridWeightsError(f"{name!r} is in float8, and its scale {key!r} is missing")
        scale = self.reader.read(key).to(torch.float32)
        if scale.numel() != 1:
            raise HybridWeightsError(
                f"{key!r} has shape {tuple(scale.shape)}; a tensor in float8 has one scale"
            )
        return scale.reshape(())

    def kept(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of prediction depths as they are, but for quantised ones, which become ``dtype``.

        What is not quantised stays in the mapped files until it is saved.
        """
        names = [name for name in self.reader.names() if name.startswith(KEPT)]
        names = [name for name in names if not name.endswith(SCALES)]
        return {
            name: self.read(name).to(dtype)
            if self.reader.dtype(name) == FP8
            else self.reader.view(name)
            for name in names
        }


@torch.no_grad()
def load_parameters(pieces: "Iterable[Piece]", config: HybridConfig, files: ModelFiles) -> None:
    """Fill parameters from their files, reading only the slices that are held.

    Args:
        pieces: what this process holds, with memory.
        config: the model's configuration.
        files: the files.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    sources: dict[str, list[tuple[Stored, int, int]]] = defaultdict(list)
    for stored in stored_tensors(config):
        start = 0
        for number, part in enumerate(stored.parts):
            sources[part.name].append((stored, number, start))
            start += part.size
    for piece in pieces:
        # A tied output layer is the embedding and is not asked for; the first source is enough.
        found = [one for one in sources[piece.name] if one[0].parts[one[1]].index]
        for stored, number, start in found or sources[piece.name][:1]:
            _fill(piece.tensor, piece.box, piece.shape, stored, number, start, files)


def _fill(
    tensor: Tensor,
    box: Box,
    shape: tuple[int, ...],
    stored: Stored,
    number: int,
    start: int,
    files: ModelFiles,
) -> None:
    """Copy what a part of a stored tensor has of ``box`` into ``tensor``."""
    index = stored.parts[number].index
    inside = Box(index + (0,) * (len(shape) - len(index)), (1,) * len(index) + shape[len(index) :])
    common = inside.intersect(box)
    if not common.numel:
        return
    found = files.shape(stored.name)
    if found != stored.shape:
        raise HybridWeightsError(
            f"{stored.name!r} on disk has shape {found}, the model needs {stored.shape}"
        )
    to, of = common.within(box), common.within(inside)
    rows, *rest = of.slices[len(index) :]
    slices = [slice(start + rows.start, start + rows.stop), *rest]
    if stored.is_convolution:
        slices.insert(1, slice(0, 1))
    values = files.read(stored.name, tuple(slices))
    target = tensor[to.offset[: len(index)] + to.slices[len(index) :]]
    target.copy_(values.reshape(target.shape))


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What files hold of a model or a part of it: parameters, and routers' biases, by name."""
    biases = {name: b for name, b in module.named_buffers() if name.endswith(BIAS)}
    return {**dict(module.named_parameters()), **biases}


def disk_specs(config: HybridConfig, dtypes: Mapping[str, torch.dtype]) -> list[Spec]:
    """Names, shapes and dtypes of the tensors in the files of a model.

    Args:
        config: of the model.
        dtypes: of its parameters.
    """
    return [
        (stored.name, stored.shape, dtypes[stored.parts[0].name])
        for stored in stored_tensors(config)
    ]


def disk_tensors(
    config: HybridConfig, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's files, each as soon as its parts are there.

    Args:
        config: of the model.
        parameters: name and whole tensor, one at a time in the model's order, so that a generator
            may gather them from other ranks; none is held longer than needed.

    Raises:
        HybridWeightsError: a parameter never came.
    """
    arriving, here = iter(parameters), {}
    waiting = stored_tensors(config)
    uses: dict[str, int] = defaultdict(int)
    for stored in waiting:
        for part in stored.parts:
            uses[part.name] += 1
    for stored in waiting:
        for part in stored.parts:
            while part.name not in here:
                name, tensor = next(arriving, (None, None))
                if name is None or tensor is None:
                    raise HybridWeightsError(f"the parameter {part.name!r} never came to be saved")
                here[name] = tensor.detach()
        yield stored.name, _assemble(stored, here)
        for part in stored.parts:
            uses[part.name] -= 1
            if not uses[part.name]:
                del here[part.name]


def _assemble(stored: Stored, parameters: Mapping[str, Tensor]) -> Tensor:
    parts = [parameters[part.name][part.index] for part in stored.parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.reshape(stored.shape)
