"""Files of figures: whether they can be written, before the work, and written whole, after it."""

import os
import tempfile
from pathlib import Path

from fivefold.kernels.errors import KernelInputError


def check_writable(path: Path | None) -> None:
    """Raise ``KernelInputError`` for a file that could not be written; None is no file."""
    if path is None:
        return
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise KernelInputError(
            f"cannot write {path}: it has to be a file in a folder that exists and can be written"
        )


def replace(path: Path, text: str) -> None:
    """Replace a file by a new one, at once: a reader finds one or the other whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
