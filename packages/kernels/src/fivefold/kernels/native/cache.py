"""Where compiled libraries are kept, under which names, and how processes take turns.

A library is called ``stem-inputs-compiler-content.so``: hashes of all that went into it, of the
compiler and of the file itself. So a file that was cut short shows, and one rename publishes it.
"""

import hashlib
import os
import platform
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fivefold.kernels.native.compiler import FLAGS, INCLUDES, TIMEOUT_SECONDS

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def folders() -> Iterator[Path]:
    """Where libraries may lie, the best first; not all of them exist or can be written to."""
    asked = os.environ.get("FIVEFOLD_CACHE_DIR")
    if asked:
        yield Path(asked)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        with suppress(RuntimeError):  # a user without a home
            yield (Path(base) if base else Path.home() / ".cache") / "fivefold"
    yield _temporary()


def writable_folder() -> Path:
    """The best folder that can be written to; it exists afterwards."""
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                if _trusted(folder):
                    return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="fivefold-"))


def inputs_name(source: Path) -> str:
    """The first part of a library's name: the file's stem and a hash of all but the compiler."""
    parts = [_cpu(), *FLAGS]
    content = [text for _, text in sorted(_texts(source).items())]
    return f"{source.stem}-{_hash([part.encode() for part in parts] + content)}"


def compiler_name(version: str) -> str:
    """The second part of a library's name."""
    return _hash([version.encode()])[:8]


def content_name(library: Path) -> str:
    """The last part of a library's name."""
    return _hash([library.read_bytes()])


def find(prefix: str) -> Iterator[Path]:
    """Whole libraries whose name begins so."""
    for folder in folders():
        if not _trusted(folder):
            continue
        for library in sorted(folder.glob(f"{prefix}-*.so")):
            try:
                if content_name(library) == library.stem.rpartition("-")[2]:
                    yield library
            except OSError:  # somebody else's, or gone
                continue


def any_library() -> bool:
    """Whether there is a library of any file."""
    return any(True for folder in folders() if _trusted(folder) for _ in folder.glob("*-*-*-*.so"))


@contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process makes what is called so, or for as long as a compiler may take.

    The turn of a process that dies ends with it. Libraries are published by one rename, so a
    process that waited in vain, or on a file system without locks, does nothing wrong by going on.
    """
    with open(folder / f"{name}.lock", "a") as lock:
        _wait(lock.fileno())
        try:
            yield
        finally:
            _unlock(lock.fileno())


def sweep(folder: Path, name: str) -> None:
    """Remove what compilers that were killed have left."""
    for left in folder.glob(f".{name}.*"):
        try:
            if time.time() - left.stat().st_mtime > 2 * TIMEOUT_SECONDS:
                left.unlink()
        except OSError:
            continue


def _wait(descriptor: int) -> None:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        try:
            return flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return None
    return None


def _unlock(descriptor: int) -> None:
    # By word and not by closing: a process that was forked meanwhile holds the same lock.
    try:
        from fcntl import LOCK_UN, flock

        flock(descriptor, LOCK_UN)
    except (ImportError, OSError):
        return


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir()) / f"fivefold-{user}"


def _trusted(folder: Path) -> bool:
    """Whether code from a folder may run as this user: anyone may have made a temporary one."""
    if folder != _temporary() or not hasattr(os, "getuid"):
        return True
    try:
        found = folder.lstat()
    except OSError:
        return False
    open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not open_to_others


def _texts(source: Path) -> dict[str, bytes]:
    """The file and all that it includes by a quoted name."""
    texts: dict[str, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        text = texts[str(path)] = path.read_bytes()
        for name in _INCLUDE.findall(text):
            found = [folder / os.fsdecode(name) for folder in (path.parent, INCLUDES)]
            waiting += [p for p in found if p.is_file() and str(p) not in texts][:1]
    return texts


@cache
def _cpu() -> str:
    """What -march=native looks at."""
    kept = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    try:
        with open("/proc/cpuinfo") as lines:
            first = list(iter(lines.readline, "\n"))[:64]
    except OSError:
        first = [platform.processor()]
    return platform.machine() + "".join(line for line in first if line.startswith(kept))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
