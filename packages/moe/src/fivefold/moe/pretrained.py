"""Model folders as transformers has them: which tensors are in them, reading and writing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fivefold.moe.card import model_card
from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError, MoEInputError, MoEWeightsError
from fivefold.moe.hf import check_names, hf_sources, parameter_shapes, saved_tensors, to_hf
from fivefold.parallel_core import hub
from fivefold.parallel_core.hub import pretrained
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.parallel_core.build import ParallelModel
    from fivefold.parallel_core.parameters import Piece
    from fivefold.parallel_core.topology import Topology

# A buffer that no file has: what a step says to the next one.
_OF_TRAINING = ".previous_load"
_GENERATION = ("bos_token_id", "eos_token_id")


class Pretrained(pretrained.Pretrained):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model."""

    config: MoEConfig
    faults = pretrained.Faults(
        config=MoEConfigError, argument=MoEInputError, weights=MoEWeightsError
    )

    @classmethod
    def _read_config(cls, folder: Path) -> MoEConfig:
        return read_config(folder)

    @classmethod
    def _stored(cls, config: MoEConfig, reader: hub.SafetensorsReader) -> list[Spec]:
        check_names(config, reader.names())
        names = [
            source
            for name, shape in parameter_shapes(config).items()
            for source, _ in hf_sources(config, name, shape)
        ]
        specs: list[Spec] = [(name, reader.shape(name), reader.dtype(name)) for name in names]
        pretrained.check_dtypes(specs, MoEWeightsError)
        return specs

    @classmethod
    def _part(cls, config: MoEConfig, topology: "Topology", dtype: torch.dtype) -> "ParallelModel":
        from fivefold.moe import sharding
        from fivefold.parallel_core.build import build

        sharding.check(config, topology.layout)
        return build(
            lambda: cls(config),
            topology,
            sharding.plan(config),
            head=sharding.HEAD,
            tail=sharding.TAIL,
            dtype=dtype,
        )

    def _fill(
        self, pieces: "list[Piece]", reader: hub.SafetensorsReader, dtype: torch.dtype
    ) -> None:
        load_parameters(pieces, self.config, reader)

    def _saved(self) -> tuple[dict[str, Tensor], Mapping[str, tuple[int, ...]]]:
        return saved_tensors(self), parameter_shapes(self.config)

    def _write(self, folder: Path, saved: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        dtypes = {name: tensor.dtype for name, tensor in saved.items()}
        write_folder(folder, self.config, dtypes, saved.items(), max_shard_size)


def read_config(folder: str | Path) -> MoEConfig:
    """Read ``config.json`` of a model folder.

    Raises:
        MoEConfigError: the file is missing, is no JSON object, or describes another model.
    """
    return MoEConfig.from_hf(pretrained.read_json(Path(folder) / pretrained.CONFIG, MoEConfigError))


def load_parameters(
    pieces: "Iterable[Piece]", config: MoEConfig, reader: hub.SafetensorsReader
) -> None:
    """Fill parameters from transformers' files, reading only the slices that are held.

    Args:
        pieces: what this process holds, with memory.
        config: the model's configuration.
        reader: the files.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    for piece in pieces:
        if piece.name.endswith(_OF_TRAINING):
            piece.tensor.zero_()
            continue
        sources = hf_sources(config, piece.name, piece.shape)
        hub.fill(piece.tensor, piece.box, piece.shape, sources, reader)


def write_folder(
    folder: str | Path,
    config: MoEConfig,
    dtypes: Mapping[str, torch.dtype],
    parameters: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model folder from parameters that arrive one at a time.

    Args:
        folder: made if missing; a model card that is there is kept.
        config: the model's configuration.
        dtypes: dtype of every parameter, in the order of ``parameters``.
        parameters: global name and whole tensor, consumed one at a time, so that a generator may
            gather them from other ranks.
        max_shard_size: bytes, or text such as ``"5GB"``.
    """
    tensors = (
        pair
        for name, tensor in parameters
        for pair in to_hf(config, {name: tensor.detach()}).items()
    )
    pretrained.write_folder(
        folder,
        config.to_hf(),
        _plan(config, dtypes),
        tensors,
        card=model_card(config),
        generation=_GENERATION,
        max_shard_size=max_shard_size,
    )


def _plan(config: MoEConfig, dtypes: Mapping[str, torch.dtype]) -> list[Spec]:
    """Names, shapes and dtypes of the tensors in the files."""
    shapes = parameter_shapes(config)
    empty = {n: torch.empty(shapes[n], dtype=dtypes[n], device="meta") for n in dtypes}
    return [(name, tuple(t.shape), t.dtype) for name, t in to_hf(config, empty).items()]
