"""Checkpoints that are saved under one layout and loaded under another.

Tensors are stored by ``torch.distributed.checkpoint`` under global names and in boxes of the whole
tensor, so nothing in the files knows how many ranks wrote them. A checkpoint appears in one
``rename`` when all of it is on disk; until then it has a name that no reader takes.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.files import atomic_write_text, sync_folder

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, eq=False)
class TensorPart:
    """This rank's box of a tensor of ``shape``; what checkpoints are made of.

    Attributes:
        tensor: the values, of shape ``box.size``; loading writes into them.
        box: where they lie.
        shape: of the whole tensor.
    """

    tensor: Tensor
    box: Box
    shape: tuple[int, ...]

    def size(self) -> torch.Size:
        """Shape of the whole tensor; torch compares it with the stored one."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.box.numel == 0:
            return []
        return [ChunkStorageMetadata(torch.Size(self.box.offset), torch.Size(self.box.size))]

    def __create_write_items__(self, name: str, part: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.tensor),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, TensorPart) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # torch's own replaces every value that is not a tensor of its kinds by None.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, TensorPart) else super().lookup_tensor(index)


class Checkpoints:
    """The checkpoints of one run: ``step-00000100`` and so on in one folder.

    Args:
        folder: the run's folder of checkpoints, on storage that all ranks share.
        keep: how many of the newest to keep; older ones are removed after a newer one is whole.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"keep={keep} checkpoints; at least 1 must be kept")
        self.folder, self.keep = Path(folder), keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, parts: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Save on all ranks together; returns when the checkpoint is whole.

        Args:
            step: number of finished steps.
            parts: name to ``TensorPart``; copies that several ranks hold are written once.
            state: small plain data of the run, the same on every rank; stored as JSON.
        """
        final = self.path(step)
        partial = final.with_suffix(".partial")
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        with _alone_is_fine():
            save(
                dict(parts),
                checkpoint_id=partial,
                planner=_SavePlanner(),
                no_dist=not dist.is_initialized(),
            )
        if _rank() == 0:
            self._finish(partial, final, {**state, "step": step})
        _barrier()
        return final

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        state["files"] = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
        atomic_write_text(partial / _STATE, json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self.folder)
        old = [self.path(step) for step in self.steps()[: -self.keep]]
        for leftover in (*old, *self.folder.glob("step-*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> Path | None:
        """The newest checkpoint all of whose files are there and of the right size."""
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                read_state(path)
            except CheckpointError:
                continue
            return path
        return None


def read_state(path: Path | str) -> dict[str, Any]:
    """The plain data saved with a checkpoint, after a look at its files.

    Raises:
        CheckpointError: it is not a checkpoint, or a file is missing or of another size.
    """
    path = Path(path)
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text())
        files = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path / name} {what}; it was saved with {size} bytes")
    return state


def load_parts(path: Path | str, parts: Mapping[str, Any]) -> None:
    """Fill ``parts`` in place from a checkpoint, on all ranks together, whatever wrote it.

    Raises:
        CheckpointError: a name is not in the checkpoint or has another shape there.
    """
    read_state(path)
    try:
        with _alone_is_fine():
            load(
                dict(parts),
                checkpoint_id=path,
                planner=_LoadPlanner(),
                no_dist=not dist.is_initialized(),
            )
    except (RuntimeError, ValueError, OSError, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} cannot be loaded into this model: {cause}") from error


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Keep torch from warning that there is one process where one is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
