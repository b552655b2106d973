"""Finding text: the files that a data source names, and the pieces of text inside them."""

import glob
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fivefold.parallel_core.errors import DataError

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
# A file up to this many bytes is one document; a longer one is a dump of many and is cut. With
# few files a split by file would be too coarse (often a single file), so these are cut earlier.
LONGEST_DOCUMENT = 1 << 20
LONGEST_OF_FEW = 1 << 15
FEW_FILES = 16
PIECE_CHARACTERS = 1 << 15

_NOT_STDLIB_TEXT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or one of the consecutive pieces of a file too long to be one.

    Args:
        text: what it says.
        opens: whether a document begins here; False continues the piece before.
    """

    text: str
    opens: bool


@dataclass(slots=True)
class Skipped:
    """What could not be used, counted rather than raised.

    Args:
        files: files that could not be read or are not UTF-8.
        lines: lines of .jsonl files that are no object with a string "text".
        reason: the first of them, for a person to read.
    """

    files: int = 0
    lines: int = 0
    reason: str = ""

    def add(self, reason: str, *, files: int = 0, lines: int = 0) -> None:
        """Count ``files`` or ``lines`` more, because of ``reason``."""
        self.files += files
        self.lines += lines
        self.reason = self.reason or reason


def python_source_files() -> list[Path]:
    """The running interpreter's standard library as .py files, sorted: text on every machine.

    Left out are installed packages and tests, which differ from one distribution of Python to
    the next, and the records of how the interpreter was built, which differ between machines.

    Raises:
        DataError: this interpreter carries no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = _walk(root, lambda name: name in _NOT_STDLIB_TEXT or name.startswith("config-"))
    files = [
        root / name
        for name in names
        if name.endswith(".py") and not os.path.basename(name).startswith("_sysconfigdata")
    ]
    if not files:
        raise DataError(
            f"{STDLIB!r} data is this Python's own source, but {root} holds no .py files: "
            "give a folder of text files"
        )
    return files


def find_files(source: Source) -> list[Path]:
    """The text files that ``source`` names, as absolute paths in a stable order.

    Args:
        source: ``"stdlib"`` for Python's own source; a folder, searched through its sub-folders
            for files that end in one of ``TEXT_SUFFIXES`` (hidden names, ``__pycache__`` and
            linked folders are not entered); a glob such as ``"books/**/*.txt"``; one file of any
            suffix; or a sequence of files, taken as they come.

    Raises:
        DataError: the path does not exist, or nothing there is a text file.
    """
    if not isinstance(source, str | os.PathLike):
        return [_listed_file(Path(file).absolute()) for file in source]
    if source == STDLIB:
        return python_source_files()
    name = os.path.expanduser(os.fspath(source))
    if name and os.path.isdir(name):
        return _folder_files(Path(name).absolute())
    if name and os.path.exists(name):
        return [Path(name).absolute()]
    if glob.has_magic(name):
        return _glob_files(name)
    raise DataError(
        f"data {name!r} does not exist: give a folder or glob of text files, "
        f"or {STDLIB!r} for Python's own source"
    )


def longest_document(num_files: int) -> int:
    """Bytes up to which a file of a corpus of ``num_files`` is kept as one document."""
    return LONGEST_DOCUMENT if num_files >= FEW_FILES else LONGEST_OF_FEW


def read_pieces(path: Path, longest: int, skipped: Skipped) -> Iterator[Piece]:
    """The text of one file, in order, at most about ``longest`` bytes in memory at a time.

    A ``.jsonl`` file is one document per line, its string field "text"; bad lines are counted in
    ``skipped``. Any other file is one document, or, beyond ``longest`` bytes, pieces of about
    ``PIECE_CHARACTERS`` that end at a line's end. Blank text gives nothing.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8; pieces may have been given before.
    """
    # newline="": line ends stay as they are, so that the tokens say what the file says.
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                text = _text_field(line)
                if text is None:
                    skipped.add(f'{path} line {number} has no string "text"', lines=1)
                elif text.strip():
                    yield Piece(text, opens=True)
            return
        opens = True
        for text in _cut(file) if os.fstat(file.fileno()).st_size > longest else [file.read()]:
            if text.strip():
                yield Piece(text, opens)
                opens = False


def _cut(file: TextIO) -> Iterator[str]:
    while text := file.read(PIECE_CHARACTERS):
        # The rest of the line; bounded, because a file may be a single line.
        yield text + file.readline(PIECE_CHARACTERS)


def _text_field(line: str) -> str | None:
    """The "text" of a JSON line; "" for a blank line, None for anything unusable."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
        text = row["text"]
        text.encode()  # escapes can spell lone surrogates, which are not text
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else None


def _walk(root: Path, leave_out: Callable[[str], bool]) -> list[str]:
    """Sorted relative names of the files under ``root``, but for folders to leave out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not leave_out(name)]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files]
    return sorted(names)


def _listed_file(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    return file


def _folder_files(root: Path) -> list[Path]:
    def hidden(name: str) -> bool:
        return name.startswith(".") or name == "__pycache__"

    names = [name for name in _walk(root, hidden) if not hidden(os.path.basename(name))]
    files = [root / name for name in names if name.endswith(TEXT_SUFFIXES)]
    if not files:
        raise DataError(
            f"folder {root} holds no text files: looked for {' '.join(TEXT_SUFFIXES)} in it and "
            f"its sub-folders, found {_what_is_there(names)}; a glob takes any suffix"
        )
    return files


def _glob_files(pattern: str) -> list[Path]:
    files = [
        Path(name).absolute()
        for name in sorted(glob.glob(pattern, recursive=True))
        if os.path.isfile(name)
    ]
    if not files:
        raise DataError(
            f"no file matches {pattern!r} (from {Path.cwd()}): "
            "** crosses folders, * and ? stay within one name"
        )
    return files


def _what_is_there(names: list[str]) -> str:
    if not names:
        return "no files at all"
    suffixes = Counter(os.path.splitext(name)[1] or "no suffix" for name in names)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    return f"{len(names)} other files ({kinds})"
