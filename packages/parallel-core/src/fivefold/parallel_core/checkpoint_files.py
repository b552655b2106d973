"""What a checkpoint's folder must hold: its state, and every file with its size and digest."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.together import Together

STATE = "state.json"


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, as ``sha256sum`` prints it."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
        for name in names
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path | str) -> dict[str, Any]:
    """The plain data saved with a checkpoint, after a look at its files.

    Raises:
        CheckpointError: it is not a checkpoint, or a file is missing or of another size.
    """
    path = Path(path)
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        files = {name: _size(described) for name, described in dict(state["files"]).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path / name} {what}; it was saved with {size} bytes")
    return state


def _size(described: Any) -> int:
    # Checkpoints of releases without digests have a number there.
    return int(described["bytes"] if isinstance(described, dict) else described)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files by name and size; empty where nothing is."""
    try:
        read_state(path)
    except CheckpointError as error:
        return str(error)
    return ""


def damage_inside(path: Path) -> str:
    """What is wrong with a checkpoint, every byte of it read; all ranks together.

    Each rank reads some of the files.

    Returns:
        The same on every rank; empty where nothing is wrong.
    """
    together = Together()
    outside = "; ".join(dict.fromkeys(filter(None, together.gather(damage(path)))))
    if outside:
        return outside
    files = list(read_state(path)["files"].items())
    mine = files[together.rank :: together.world_size]
    wrong = [text for name, described in mine if (text := _changed(path / name, described))]
    return "; ".join(text for texts in together.gather(wrong) for text in texts)


def _changed(path: Path, described: Any) -> str:
    saved = described.get("sha256") if isinstance(described, dict) else None
    if saved is None:
        return ""
    try:
        found = _digest(path)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if found == saved:
        return ""
    return f"{path} is corrupt: its SHA-256 is {found}, it was saved with {saved}"
