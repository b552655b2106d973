"""Models that load from folders in transformers' form, save to them, and are published."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fivefold.parallel_core.files import atomic_write_text, write_json
from fivefold.parallel_core.hub.reader import SafetensorsReader
from fivefold.parallel_core.hub.repository import push, resolve
from fivefold.parallel_core.hub.writer import Spec, write_sharded

if TYPE_CHECKING:
    from fivefold.parallel_core.build import ParallelModel
    from fivefold.parallel_core.parameters import Piece
    from fivefold.parallel_core.topology import Topology

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""Types that parameters may have, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """The errors that a package raises for what is wrong with a model.

    Attributes:
        config: a configuration that cannot be.
        argument: a value that a caller cannot ask for.
        weights: tensors that are not those of the model.
    """

    config: type[Exception]
    argument: type[Exception]
    weights: type[Exception]


class Pretrained(nn.Module, ABC):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model.

    A package's own base says by five methods which tensors its files hold.

    Attributes:
        config: the model's.
        faults: errors of the package.
    """

    config: Any
    faults: ClassVar[Faults]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Make parameters that are one parameter the same object again."""

    # ---- what a package says ----------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _read_config(cls, folder: Path) -> Any:
        """The configuration of a folder."""

    @classmethod
    @abstractmethod
    def _stored(cls, config: Any, reader: SafetensorsReader) -> list[Spec]:
        """The model's tensors in the files, after their names and types have been checked."""

    @classmethod
    @abstractmethod
    def _part(cls, config: Any, topology: "Topology", dtype: torch.dtype) -> "ParallelModel":
        """This rank's part of a model, with memory but no values."""

    @abstractmethod
    def _fill(self, pieces: "list[Piece]", reader: SafetensorsReader, dtype: torch.dtype) -> None:
        """Read the values of what this process holds; ``dtype`` is the model's."""

    @abstractmethod
    def _saved(self) -> tuple[dict[str, Tensor], Mapping[str, tuple[int, ...]]]:
        """What is saved of this process's tensors, and the shapes of the whole ones."""

    @abstractmethod
    def _write(self, folder: Path, saved: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        """Write what ``_saved`` gave."""

    # ---- what follows from it ---------------------------------------------------------------

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
            faults.config: the configuration is missing or not supported.
            faults.argument: ``dtype`` is no such type.
            CheckpointError: files are missing, damaged, or not the weights of this model.
        """
        asked = None if dtype is None else asked_dtype(dtype, cls.faults.argument)
        folder = resolve(name_or_path, revision)
        config = cls._read_config(folder)
        with SafetensorsReader(folder) as reader:
            held = main_dtype(cls._stored(config, reader))
            chosen = asked or config_dtype(folder, cls.faults.config) or held
            model, pieces = cls._allocate(config, topology, chosen)
            model._fill(pieces, reader, chosen)
        return model.eval()

    @classmethod
    def _allocate(
        cls, config: Any, topology: "Topology | None", dtype: torch.dtype
    ) -> "tuple[Self, list[Piece]]":
        """The model, or this rank's part of it, with memory but no values."""
        from fivefold.parallel_core.parameters import ParameterTable

        if topology is not None:
            built = cls._part(config, topology, dtype)
            (part,) = built.parts
            return cast("Self", part), [*built.pieces(), *built.buffers()]
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=torch.get_default_device())
        model.tie_weights()
        table = ParameterTable.of(model)
        return model, [*table.pieces(model), *table.buffers(model)]

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write the model as transformers does: configuration, safetensors, model card.

        A save that is killed leaves what was there before, or a folder that no reader takes.

        Args:
            folder: made if missing; a model card that is there is kept.
            max_shard_size: bytes, or text such as ``"5GB"``, of one safetensors file.

        Raises:
            faults.weights: this process holds only a part of the model.
        """
        saved, shapes = self._saved()
        for name, shape in shapes.items():
            held = tuple(saved[name].shape) if name in saved else None
            if held != shape:
                raise self.faults.weights(
                    f"cannot save {name!r} of shape {shape}: this process holds "
                    f"{held or 'nothing'} of it"
                )
        self._write(Path(folder), saved, max_shard_size)

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
            return push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message or "Upload model",
                token=token,
            )


def read_json(path: Path, error: type[Exception]) -> dict[str, Any]:
    """Read a JSON object; raises ``error`` where the file is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as found:
        raise error(f"cannot read {path}: {found.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as found:
        raise error(f"{path} is not a JSON object: {found}") from None
    if not isinstance(described, dict):
        raise error(f"{path} is not a JSON object: it holds a {type(described).__name__}")
    return described


def asked_dtype(value: torch.dtype | str, error: type[Exception]) -> torch.dtype:
    """A type that a model may have, by itself or its name; raises ``error`` for any other."""
    dtype = _named_dtype(value)
    if dtype is None:
        raise error(f"dtype is {value!r}; legal: {', '.join(DTYPES)}, or None")
    return dtype


def config_dtype(folder: str | Path, error: type[Exception]) -> torch.dtype | None:
    """The type in ``config.json``, as version 5 or 4 of transformers writes it; None without one.

    Raises:
        error: it is none that a model may have, or the file cannot be read.
    """
    described = read_json(Path(folder) / CONFIG, error)
    for key in ("dtype", "torch_dtype"):
        value = described.get(key)
        if value is not None:
            dtype = _named_dtype(value)
            if dtype is None:
                raise error(f"{key} is {value!r} in config.json; legal: {', '.join(DTYPES)}")
            return dtype
    return None


def _named_dtype(value: object) -> torch.dtype | None:
    return DTYPES.get(str(value).removeprefix("torch."))


def check_dtypes(specs: Sequence[Spec], error: type[Exception], also: str = "") -> None:
    """Check that tensors on disk are of types that parameters may have.

    Args:
        specs: name, shape and type of each.
        error: raised for the first other one.
        also: what else would be legal, for the message.
    """
    for name, _, dtype in specs:
        if dtype not in DTYPES.values():
            raise error(f"{name!r} on disk is of {dtype}; legal: {', '.join(DTYPES)}{also}")


def main_dtype(specs: Iterable[Spec]) -> torch.dtype:
    """The type of most elements."""
    sizes: Counter[torch.dtype] = Counter()
    for _, shape, dtype in specs:
        sizes[dtype] += prod(shape)
    return sizes.most_common(1)[0][0]


def write_folder(
    folder: str | Path,
    described: Mapping[str, Any],
    specs: list[Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    card: str,
    generation: Sequence[str],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model folder from tensors that arrive one at a time.

    Args:
        folder: made if missing; a model card that is there is kept.
        described: the configuration as transformers has it, but for the type.
        specs: names, shapes and types of the tensors.
        tensors: names and tensors in the same order, consumed one at a time, so that a generator
            may gather them from other ranks.
        card: text of the model card.
        generation: which keys of the configuration generation needs.
        max_shard_size: bytes, or text such as ``"5GB"``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        atomic_write_text(folder / CARD, card)
    ids = {key: described[key] for key in generation}
    write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    write_sharded(folder, specs, tensors, max_shard_size)
    # Last: a folder without it is no model to anyone.
    dtype = str(main_dtype(specs)).removeprefix("torch.")
    write_json(folder / CONFIG, {**described, "dtype": dtype})
