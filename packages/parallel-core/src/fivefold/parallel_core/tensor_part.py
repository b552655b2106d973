"""A rank's part of a tensor, and how ``torch.distributed.checkpoint`` saves and loads it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fivefold.parallel_core.box import Box


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


class PartSavePlanner(DefaultSavePlanner):
    """Saves ``TensorPart``s."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The values to write."""
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, TensorPart) else super().lookup_object(index)


class PartLoadPlanner(DefaultLoadPlanner):
    """Loads into ``TensorPart``s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the parts as they are."""
        # torch's own replaces every value that is not a tensor of its kinds by None.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The values to write into."""
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, TensorPart) else super().lookup_tensor(index)


class PartWriter(FileSystemWriter):
    """Tells what the system said where torch's zip writer says "unexpected pos 704 vs 598".

    Attributes:
        written: names of the files that this rank has written.
    """

    written: tuple[str, ...] = ()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, and raise the system's error where there is one."""
        try:
            results = super().write_data(plan, planner)
            names = {result.storage_data.relative_path for result in results.wait()}
            self.written = tuple(sorted(names))
            return results
        except Exception as error:
            # Here, as the chain of causes does not survive the way to the other ranks.
            raise _system_error(error) or error from None


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error that led to ``error``, if one did."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
