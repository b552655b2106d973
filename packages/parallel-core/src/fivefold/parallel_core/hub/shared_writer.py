"""Writing a folder of safetensors by all ranks together, no rank ever holding the model.

Every file has one rank that writes it. Tensors are taken in rounds, one of each file that is being
written: ranks send their boxes of it straight to its writer, which writes it and lets go of it.
A rank holds, beside its own pieces, one tensor, one box of it on its way in, and its boxes of the
round on their way out.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import IO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.files import synced_file, temporary_name
from fivefold.parallel_core.hub.header import Entry, plan_header
from fivefold.parallel_core.hub.shared_table import HeldPiece, OnDisk, Part, Sources, make_table
from fivefold.parallel_core.hub.writer import (
    checked,
    file_names,
    index_of,
    num_bytes,
    publish,
    raw,
    remove,
    split,
)
from fivefold.parallel_core.together import Together

__all__ = ["HeldPiece", "Sources", "write_together"]

T = TypeVar("T")


def write_together(
    folder: str | Path,
    pieces: Sequence[HeldPiece],
    sources: Sources,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a model that lies over the ranks as one folder, in Hugging Face form.

    All ranks of the job call this. The folder becomes the new save as with ``write_sharded``.

    Args:
        folder: on storage that all ranks share; made if missing.
        pieces: what this rank holds; copies that several ranks hold are written once.
        sources: what the tensors are called on disk.
        dtype: on disk; None is each piece's own.
        max_shard_size: as for ``write_sharded``. There are as many writers at a time as there are
            files, up to the number of ranks.
        metadata: text for the files' headers.

    Returns:
        The files that hold the tensors.

    Raises:
        CheckpointError: pieces do not cover a tensor, or a file cannot be written; the same on
            every rank.
        ConfigError: ``max_shard_size`` is no size.
    """
    together = Together()
    try:
        return _Write(Path(folder), pieces, dtype, together).run(
            make_table(together, pieces, sources, dtype),
            max_shard_size,
            metadata or {"format": "pt"},
        )
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {folder}: {error}") from None


class _Write:
    """One save, seen from one rank."""

    def __init__(
        self,
        folder: Path,
        pieces: Sequence[HeldPiece],
        dtype: torch.dtype | None,
        together: Together,
    ):
        self.folder, self.together, self.dtype = folder, together, dtype
        self.pieces = {piece.name: piece for piece in pieces}
        self.failed: OSError | None = None

    def run(
        self, table: list[OnDisk], max_shard_size: int | str, metadata: Mapping[str, str]
    ) -> list[Path]:
        shards = split(checked(on_disk.spec for on_disk in table), num_bytes(max_shard_size))
        names = file_names(len(shards))
        self.together.on_first(self._make_folder)
        # With the first rank's process id, as it is the one that gives the files their names.
        partial = self.together.from_first({n: self.folder / temporary_name(n) for n in names})
        by_name = {on_disk.spec[0]: on_disk for on_disk in table}
        files = [
            (partial[n], [by_name[s[0]] for s in c]) for n, c in zip(names, shards, strict=True)
        ]
        try:
            size = self.together.world_size
            for first in range(0, len(files), size):
                self._write_files(files[first : first + size], metadata)
            index = index_of(names, shards)
            self.together.on_first(lambda: publish(self.folder, partial, index))
        finally:
            if self.together.rank == 0:
                remove(partial.values())
        return [self.folder / name for name in names]

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(self.folder.glob(".model*.partial-*"))  # of a save that was killed

    def _write_files(
        self, files: Sequence[tuple[Path, list[OnDisk]]], metadata: Mapping[str, str]
    ) -> None:
        """Write as many files at once as there are ranks; the i-th is rank i's."""
        with ExitStack() as stack:
            mine: tuple[IO[bytes], int, Mapping[str, Entry]] | None = None
            if self.together.rank < len(files):
                path, tensors = files[self.together.rank]
                mine = self._try(lambda: self._open(stack, path, tensors, metadata))
            for wave in zip_longest(*(tensors for _, tensors in files)):
                self._agree()
                self._round(wave, mine)
            self._agree()
            self._try(stack.close)  # here the system says what it could not write
            self._agree()

    def _open(
        self,
        stack: ExitStack,
        path: Path,
        tensors: Sequence[OnDisk],
        metadata: Mapping[str, str],
    ) -> tuple[IO[bytes], int, Mapping[str, Entry]]:
        specs = {t.spec[0]: (tuple(t.spec[1]), t.spec[2]) for t in tensors}
        header, entries = plan_header(specs, metadata)
        file = stack.enter_context(synced_file(path))
        file.write(header)
        return file, len(header), entries

    def _round(
        self,
        wave: Sequence[OnDisk | None],
        mine: tuple[IO[bytes], int, Mapping[str, Entry]] | None,
    ) -> None:
        """One tensor of each file: boxes go to the writers, and these write."""
        leaving = []
        for writer, on_disk in enumerate(wave):
            for part in on_disk.parts if on_disk is not None and writer != self._rank else ():
                if on_disk is not None and part.rank == self._rank:
                    values = self._values(on_disk, part)
                    work = dist.isend(values, writer, group=self.together.group)
                    leaving.append((work, values))  # which must live until it has left
        if self._rank < len(wave) and (on_disk := wave[self._rank]) is not None:
            whole = self._receive(on_disk)
            self._try(lambda: self._put(on_disk, whole, mine))
        for work, _ in leaving:
            if work is not None:
                work.wait()

    @property
    def _rank(self) -> int:
        return self.together.rank

    def _values(self, on_disk: OnDisk, part: Part) -> Tensor:
        """This rank's values of a part, as bytes, since gloo does not know every dtype."""
        name, source = on_disk.source
        piece = self.pieces[name]
        offset = tuple(a + b for a, b in zip(part.box.offset, source.offset, strict=True))
        there = Box(offset, part.box.size).within(piece.box)
        values = piece.tensor.detach()[there.slices].to("cpu", self.dtype or piece.tensor.dtype)
        return values.contiguous().view(-1).view(torch.uint8)

    def _receive(self, on_disk: OnDisk) -> Tensor:
        _, source = on_disk.source
        kind = on_disk.spec[2]
        whole = torch.empty(source.size, dtype=kind)
        for part in on_disk.parts:
            if part.rank == self._rank:
                values = self._values(on_disk, part)
            else:
                values = torch.empty(part.box.numel * kind.itemsize, dtype=torch.uint8)
                dist.recv(values, part.rank, group=self.together.group)
            whole[part.box.slices] = values.view(kind).view(part.box.size)
        return whole

    def _put(
        self,
        on_disk: OnDisk,
        whole: Tensor,
        mine: tuple[IO[bytes], int, Mapping[str, Entry]] | None,
    ) -> None:
        if mine is not None:
            file, start, entries = mine
            file.seek(start + entries[on_disk.spec[0]].start)
            file.write(raw(whole))

    def _try(self, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except OSError as error:
            self.failed = self.failed or error
            return None

    def _agree(self) -> None:
        """Stop on all ranks where one could not write."""

        def tell() -> None:
            if self.failed is not None:
                raise self.failed

        self.together.on_each(tell)
