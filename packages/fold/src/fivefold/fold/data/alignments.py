"""Alignments of a3m and Stockholm files as arrays.

Legend: S sequences, the query first; N residues of the query.
"""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import GAP, LETTERS, UNKNOWN

# What other databases write: B is D or N, Z is E or Q, U selenocysteine, J and O are unknown here.
_OTHER = {"B": "D", "Z": "E", "U": "C"}
_INVALID = -1
SUFFIXES = (".a3m", ".sto", ".stockholm")


def _letters() -> NDArray[np.int8]:
    numbers = np.full(256, _INVALID, np.int8)
    for number, letter in enumerate(LETTERS):
        numbers[ord(letter)] = number
    for letter, same in _OTHER.items():
        numbers[ord(letter)] = LETTERS.index(same)
    for letter in "XJO":
        numbers[ord(letter)] = UNKNOWN
    numbers[ord("-")] = GAP
    return numbers


_NUMBERS = _letters()


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Sequences aligned to a query, the first of them.

    Attributes:
        classes: (S, N) int8 numbers of amino acids, 20 unknown, 21 a gap.
        deletions: (S, N) int32 how many residues of a sequence were left out before each place.
        names: of the sequences, as the file describes them.
    """

    classes: NDArray[np.int8]
    deletions: NDArray[np.int32]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, keep: NDArray[np.integer]) -> "Alignment":
        """Some of the sequences, by number."""
        return Alignment(
            classes=self.classes[keep],
            deletions=self.deletions[keep],
            names=tuple(self.names[i] for i in keep),
        )


class EmptyAlignmentError(FoldDataError):
    """There is no sequence in an alignment, as where a search found nothing."""


def read_alignment(path: str | Path) -> Alignment:
    """Read .a3m, .sto or .stockholm, packed with gzip (.gz) or not.

    Raises:
        EmptyAlignmentError: there is no sequence in it; with the file's name, as below.
        FoldDataError: no such file or format, or rows that do not fit.
    """
    path = Path(path)
    plain = Path(path.stem) if path.suffix == ".gz" else path
    if plain.suffix not in SUFFIXES:
        raise FoldDataError(f"{path} is none of {', '.join(SUFFIXES)}, packed as .gz or not")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        return parse_a3m(text) if plain.suffix == ".a3m" else parse_stockholm(text)
    except EmptyAlignmentError as error:
        raise EmptyAlignmentError(f"{path} cannot be read: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError, FoldDataError) as error:
        raise FoldDataError(f"{path} cannot be read: {error}") from error


def parse_fasta(text: str) -> list[tuple[str, str]]:
    """Descriptions and sequences of a FASTA file.

    Raises:
        FoldDataError: letters before the first description.
    """
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith(">"):
            found.append((line[1:], []))
        elif line and not found:
            raise FoldDataError(f"a line {line[:40]!r} stands before the first that begins with >")
        elif line:
            found[-1][1].append(line)
    return [(name, "".join(parts)) for name, parts in found]


def parse_a3m(text: str) -> Alignment:
    """An alignment whose insertions are lower case; dots, which pad them, say nothing.

    Raises:
        EmptyAlignmentError: there is no sequence, or an empty one.
        FoldDataError: rows of different lengths.
    """
    rows = []
    # Sequences of ColabFold's files may follow a line of comment and end with a zero byte.
    kept = "\n".join(x for x in text.replace("\0", "").splitlines() if not x.startswith("#"))
    for name, sequence in parse_fasta(kept):
        letters = np.frombuffer(sequence.replace(".", "").encode("ascii", "replace"), np.uint8)
        inserted = (letters >= ord("a")) & (letters <= ord("z"))
        rows.append((name, letters[~inserted], _counts(inserted, ~inserted)))
    return _alignment(rows)


def parse_stockholm(text: str) -> Alignment:
    """An alignment of which the columns where the first sequence has a gap are insertions.

    Raises:
        EmptyAlignmentError: there is no sequence, or an empty one.
        FoldDataError: rows of different lengths.
    """
    blocks: dict[str, list[str]] = {}
    for line in text.splitlines():
        fields = line.split()
        if not fields or line.lstrip().startswith(("#", "//")):
            continue
        if len(fields) != 2:
            raise FoldDataError(f"a line {line[:60]!r} is no name with a sequence")
        blocks.setdefault(fields[0], []).append(fields[1])
    rows: list[_Row] = []
    columns = np.zeros(0, bool)
    for name, parts in blocks.items():
        sequence = "".join(parts).upper().replace(".", "-").encode("ascii", "replace")
        letters = np.frombuffer(sequence, np.uint8)
        if not rows:
            columns = letters != ord("-")
        if len(letters) != len(columns):
            raise FoldDataError(
                f"{name!r} has {len(letters)} columns, the first sequence {len(columns)}"
            )
        inserted = ~columns & (letters != ord("-"))
        rows.append((name, letters[columns], _counts(inserted, columns)))
    return _alignment(rows)


_Row = tuple[str, NDArray[np.uint8], NDArray[np.int32]]


def _counts(inserted: NDArray[np.bool_], columns: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many letters were inserted before each of the columns and after the one before."""
    before = np.cumsum(inserted)[columns]
    return np.diff(before, prepend=0).astype(np.int32)


def _alignment(rows: Sequence[_Row]) -> Alignment:
    if not rows or not len(rows[0][1]):
        raise EmptyAlignmentError("an alignment of no sequence, or of an empty one")
    length = len(rows[0][1])
    for number, (name, letters, _) in enumerate(rows):
        if len(letters) != length:
            raise FoldDataError(
                f"row {number} ({name[:40]!r}) has {len(letters)} columns, the query {length}"
            )
    classes = _NUMBERS[np.stack([letters for _, letters, _ in rows])]
    if (classes == _INVALID).any():
        row, column = (int(x[0]) for x in np.nonzero(classes == _INVALID))
        raise FoldDataError(
            f"row {row} ({rows[row][0][:40]!r}) has {chr(rows[row][1][column])!r} at "
            f"{column + 1}; letters and - are legal"
        )
    deletions = np.stack([counts for _, _, counts in rows])
    return Alignment(classes=classes, deletions=deletions, names=tuple(n for n, _, _ in rows))


def join(alignments: Iterable[Alignment], *, unique: bool = True) -> Alignment:
    """Several alignments of one query, one below the other.

    Args:
        alignments: the query is the first row of each.
        unique: of sequences that are alike in all columns only the first stays, as in AlphaFold.

    Raises:
        FoldDataError: none given, or their queries are not the same.
    """
    parts = list(alignments)
    if not parts:
        raise FoldDataError("no alignment was given; the query alone would be one")
    for number, part in enumerate(parts):
        if not np.array_equal(part.classes[0], parts[0].classes[0]):
            raise FoldDataError(
                f"alignment {number} is of {sequence_of(part)!r}, the first of "
                f"{sequence_of(parts[0])!r}; all have to begin with the same query"
            )
    whole = Alignment(
        classes=np.concatenate([part.classes for part in parts]),
        deletions=np.concatenate([part.deletions for part in parts]),
        names=tuple(name for part in parts for name in part.names),
    )
    if not unique:
        return whole
    _, first = np.unique(whole.classes, axis=0, return_index=True)
    return whole.rows(np.sort(first))


def query_only(sequence: str) -> Alignment:
    """The alignment of a sequence with nothing else."""
    return parse_a3m(f">query\n{sequence}")


def sequence_of(alignment: Alignment) -> str:
    """The query in letters, X where it is unknown."""
    return "".join((LETTERS + "X-")[number] for number in alignment.classes[0])
