"""Reading slices of tensors from a folder of safetensors."""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub.header import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """The tensors of ``model.safetensors``, or of the shards that an index file lists.

    Files are mapped into memory when one of their tensors is first asked for, and only the bytes
    of the asked slices are read. A file's length is checked against its header before that.

    Args:
        folder: where the files are. With both a single file and an index, the single file counts,
            as in transformers.

    Raises:
        CheckpointError: the folder, the files or a shard of the index is missing.

    Example::

        with SafetensorsReader("checkpoint") as reader:
            rows = reader.read("lm_head.weight", (slice(0, 128), slice(None)))
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._headers: dict[str, dict[str, Entry]] = {}
        self._open: dict[str, Any] = {}
        self._files = _locate(self.folder, self._header)

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads its file's header only."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor on disk; reads its file's header only."""
        return self._entry(name).dtype

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """A new CPU tensor with the whole of ``name``, or with a rectangle of it.

        Args:
            name: name on disk.
            slices: one slice with step 1 for each dim; None is everything.

        Raises:
            CheckpointError: no such tensor, a damaged file, or slices outside the tensor.
        """
        return self.view(name, slices).clone()

    def view(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """As ``read``, but a window onto the mapped file: to copy from, never to write to."""
        entry = self._entry(name)
        rows = _checked(name, entry.shape, slices)
        if any(s.start == s.stop for s in rows):
            return torch.empty([s.stop - s.start for s in rows], dtype=entry.dtype)
        piece: Tensor = self._opened(self._files[name]).get_slice(name)[rows]
        return piece

    def close(self) -> None:
        """Unmap the files; the reader can be used again and maps them anew."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _entry(self, name: str) -> Entry:
        if name not in self._files:
            near = difflib.get_close_matches(name, self._files, n=3, cutoff=0.5)
            listed = ", ".join(near) or "none similar"
            count = len(self._files)
            raise CheckpointError(f"{self.folder} has no {name!r}; nearest of {count}: {listed}")
        header = self._header(self._files[name])
        if name not in header:
            raise CheckpointError(
                f"{self.folder / self._files[name]} has no {name!r}, which {INDEX} places there; "
                f"it has {len(header)} other tensors"
            )
        return header[name]

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
        return self._open[file]


def _locate(folder: Path, header: Callable[[str], dict[str, Entry]]) -> dict[str, str]:
    """Tensor names to file names."""
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}")
    if (folder / SINGLE).is_file():
        return dict.fromkeys(header(SINGLE), SINGLE)
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.iterdir())
        listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; found {listed or 'an empty folder'}"
        )
    files = _read_index(folder / INDEX)
    missing = [file for file in dict.fromkeys(files.values()) if not (folder / file).is_file()]
    if missing:
        count = len(set(files.values()))
        raise CheckpointError(
            f"{folder / INDEX} lists {count} files, {len(missing)} of them missing: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged index, no readable weight_map: {error!r}") from None


def _checked(
    name: str, shape: tuple[int, ...], slices: Sequence[slice] | None
) -> tuple[slice, ...]:
    """Slices with explicit ends; safetensors would silently clamp those that go beyond."""
    if slices is None:
        return tuple(slice(0, size) for size in shape)
    ends = [
        (0 if s.start is None else s.start, size if s.stop is None else s.stop)
        for s, size in zip(slices, shape, strict=False)
    ]
    legal = all(0 <= a <= b <= n for (a, b), n in zip(ends, shape, strict=False))
    if len(slices) != len(shape) or not legal or any(s.step not in (None, 1) for s in slices):
        raise CheckpointError(f"{name!r} has shape {shape}; asked for {tuple(slices)}")
    return tuple(slice(a, b) for a, b in ends)
