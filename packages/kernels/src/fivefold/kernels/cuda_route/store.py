"""Where machine code is kept: beside the libraries of the CPU route, under the same kind of names.

A file is called ``stem-inputs-content.cubin``: hashes of all that went into it and of the file
itself. So one that was cut short shows, and one rename publishes it.
"""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from fivefold.kernels.native import cache as native_cache

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def name_of(source: Path, settings: str, compiler: str) -> str:
    """The name of a file's machine code, without the hash of its content."""
    digest = hashlib.sha256(f"{settings}\n{compiler}\n".encode())
    for text in _texts(source):
        digest.update(len(text).to_bytes(8, "little") + text)
    return f"{source.stem}-{digest.hexdigest()[:16]}"


def read(name: str) -> bytes | None:
    """What is kept under a name, None where there is nothing or nothing whole."""
    for path in sorted(native_cache.writable_folder().glob(f"{name}-*.cubin")):
        try:
            content = path.read_bytes()
        except OSError:  # just swept away
            continue
        if path.stem == f"{name}-{_hash(content)}":
            return content
    return None


def write(name: str, content: bytes) -> None:
    """Keep machine code; several processes may do so at once."""
    folder = native_cache.writable_folder()
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, folder / f"{name}-{_hash(content)}.cubin")
    except OSError:
        # A full disk is no reason not to run what is compiled already.
        Path(temporary).unlink(missing_ok=True)


def _texts(source: Path) -> list[bytes]:
    """The file and all that it includes by a quoted name."""
    texts: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in texts and path.is_file():
            texts[path] = path.read_bytes()
            names = _INCLUDE.findall(texts[path])
            waiting += [path.parent / os.fsdecode(name) for name in reversed(names)]
    return list(texts.values())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
