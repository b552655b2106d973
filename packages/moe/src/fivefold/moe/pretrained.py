"""Model folders as transformers has them: reading, writing and publishing."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from fivefold.moe.card import model_card
from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError, MoEInputError, MoEWeightsError
from fivefold.moe.hf import check_names, hf_sources, parameter_shapes, saved_tensors, to_hf
from fivefold.parallel_core import hub
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.parallel_core.parameters import Piece
    from fivefold.parallel_core.topology import Topology

# A buffer that no file has: what a step says to the next one.
_OF_TRAINING = ".previous_load"
CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class Pretrained(nn.Module):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model."""

    config: MoEConfig

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Make parameters that are one parameter the same object again."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        topology: "Topology | None" = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a model from a folder or repository in transformers' form, in eval mode.

        The weights are read straight into place, without being initialised first, and each
        process reads only what it holds.

        Args:
            name_or_path: folder with ``config.json`` and safetensors, or repository of one.
            topology: ranks to lay the model over; this rank's pipeline stage is returned. None
                is the whole model on torch's default device.
            dtype: of the parameters: a floating-point type of at least 16 bits, or its name such as
                ``"bfloat16"``. None is what ``config.json`` says or, where it says nothing, the
                type of most elements in the files.
            revision: branch, tag or commit of the repository.

        Raises:
            MoEConfigError: the configuration is missing or not supported.
            MoEInputError: ``dtype`` is no such type.
            CheckpointError: files are missing, damaged, or not the weights of this model.
        """
        asked = None if dtype is None else _asked_dtype(dtype)
        folder = hub.resolve(name_or_path, revision)
        config = read_config(folder)
        with hub.SafetensorsReader(folder) as reader:
            check_names(config, reader.names())
            held = _held_dtype(config, reader)
            model, pieces = cls._allocate(config, topology, asked or _config_dtype(folder) or held)
            load_parameters(pieces, config, reader)
        return model.eval()

    @classmethod
    def _allocate(
        cls, config: MoEConfig, topology: "Topology | None", dtype: torch.dtype
    ) -> "tuple[Self, list[Piece]]":
        """The model, or this rank's part of it, with memory but no values."""
        from fivefold.parallel_core.parameters import ParameterTable

        if topology is not None:
            return cls._allocate_part(config, topology, dtype)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=torch.get_default_device())
        model.tie_weights()
        table = ParameterTable.of(model)
        return model, [*table.pieces(model), *table.buffers(model)]

    @classmethod
    def _allocate_part(
        cls, config: MoEConfig, topology: "Topology", dtype: torch.dtype
    ) -> "tuple[Self, list[Piece]]":
        from fivefold.moe import sharding
        from fivefold.parallel_core.build import build

        sharding.check(config, topology.layout)
        built = build(
            lambda: cls(config),
            topology,
            sharding.plan(config),
            head=sharding.HEAD,
            tail=sharding.TAIL,
            dtype=dtype,
        )
        (model,) = built.parts
        return cast("Self", model), [*built.pieces(), *built.buffers()]

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write the model as transformers does: configuration, safetensors, model card.

        A save that is killed leaves what was there before, or a folder that no reader takes.

        Args:
            folder: made if missing; a model card that is there is kept.
            max_shard_size: bytes, or text such as ``"5GB"``, of one safetensors file.

        Raises:
            MoEWeightsError: this process holds only a part of the model.
        """
        parameters = saved_tensors(self)
        for name, shape in parameter_shapes(self.config).items():
            held = tuple(parameters[name].shape) if name in parameters else None
            if held != shape:
                raise MoEWeightsError(
                    f"cannot save {name!r} of shape {shape}: this process holds "
                    f"{held or 'nothing'} of it"
                )
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        write_folder(folder, self.config, dtypes, parameters.items(), max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Save to a temporary folder and upload that; arguments as ``hub.push``.

        Returns:
            The repository's address.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size)
            return hub.push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message or "Upload model",
                token=token,
            )


def read_config(folder: str | Path) -> MoEConfig:
    """Read ``config.json`` of a model folder.

    Raises:
        MoEConfigError: the file is missing, is no JSON object, or describes another model.
    """
    return MoEConfig.from_hf(read_json(Path(folder) / CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ``MoEConfigError`` where the file is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoEConfigError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MoEConfigError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(described, dict):
        raise MoEConfigError(f"{path} is not a JSON object: it holds a {type(described).__name__}")
    return described


def _named_dtype(value: object) -> torch.dtype | None:
    """A type that a model may have, or its name with or without ``torch.``."""
    return _DTYPES.get(str(value).removeprefix("torch."))


def _asked_dtype(value: torch.dtype | str) -> torch.dtype:
    dtype = _named_dtype(value)
    if dtype is None:
        raise MoEInputError(f"dtype is {value!r}; legal: {', '.join(_DTYPES)}, or None")
    return dtype


def _config_dtype(folder: str | Path) -> torch.dtype | None:
    """The type in ``config.json``, as version 5 or version 4 writes it; None if it has none."""
    described = read_json(Path(folder) / CONFIG)
    for key in ("dtype", "torch_dtype"):
        value = described.get(key)
        if value is not None:
            dtype = _named_dtype(value)
            if dtype is None:
                raise MoEConfigError(
                    f"{key} is {value!r} in config.json; legal: {', '.join(_DTYPES)}"
                )
            return dtype
    return None


def _held_dtype(config: MoEConfig, reader: hub.SafetensorsReader) -> torch.dtype:
    """The type of most elements of the model in the files, all of them checked."""
    specs = []
    for name, shape in parameter_shapes(config).items():
        for source, _ in hf_sources(config, name, shape):
            dtype = reader.dtype(source)
            if dtype not in _DTYPES.values():
                raise MoEWeightsError(
                    f"{source!r} on disk is of {dtype}; legal: {', '.join(_DTYPES)}"
                )
            specs.append((source, reader.shape(source), dtype))
    return main_dtype(specs)


def main_dtype(specs: Iterable[Spec]) -> torch.dtype:
    """The type of most elements."""
    sizes: Counter[torch.dtype] = Counter()
    for _, shape, dtype in specs:
        sizes[dtype] += prod(shape)
    return sizes.most_common(1)[0][0]


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        hub.atomic_write_text(folder / CARD, model_card(config))
    hub.write_json(folder / GENERATION, _generation_config(config))
    plan = _plan(config, dtypes)
    tensors = (
        pair
        for name, tensor in parameters
        for pair in to_hf(config, {name: tensor.detach()}).items()
    )
    hub.write_sharded(folder, plan, tensors, max_shard_size)
    # Last: a folder without it is no model to anyone.
    dtype = str(main_dtype(plan)).removeprefix("torch.")
    hub.write_json(folder / CONFIG, config.to_hf() | {"dtype": dtype})


def _plan(config: MoEConfig, dtypes: Mapping[str, torch.dtype]) -> list[Spec]:
    """Names, shapes and dtypes of the tensors in the files."""
    shapes = parameter_shapes(config)
    empty = {n: torch.empty(shapes[n], dtype=dtypes[n], device="meta") for n in dtypes}
    return [(name, tuple(t.shape), t.dtype) for name, t in to_hf(config, empty).items()]


def _generation_config(config: MoEConfig) -> dict[str, Any]:
    described = config.to_hf()
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id")}
    return {"_from_model_config": True, **ids}
