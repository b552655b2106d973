"""Files that are either the old one or the new one, whenever the process is killed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` only when the block has ended without error.

    Args:
        path: final name; missing parent folders are made. An older file is replaced.

    Yields:
        The open file, which has a temporary name in the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(temporary_name(path.name))
    try:
        with synced_file(partial) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def synced_file(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file whose bytes are on disk when the block has ended without error."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def temporary_name(name: str) -> str:
    """What a file is called until it is complete; hidden, so no reader takes it for whole."""
    return f".{name}.partial-{os.getpid()}"


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, all or nothing."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_text(path: str | Path, data: str) -> None:
    """Write ``data`` to ``path`` as UTF-8, all or nothing."""
    atomic_write_bytes(path, data.encode())


def write_json(path: str | Path, data: Any) -> None:
    """Write plain ``data`` as indented JSON, all or nothing.

    Raises:
        TypeError, ValueError: ``data`` holds what JSON cannot (a tensor, nan, infinity).
    """
    atomic_write_text(path, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
