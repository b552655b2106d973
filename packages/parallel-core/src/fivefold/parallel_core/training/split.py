"""Splitting a corpus by content: every distinct text is either trained on or held out."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fivefold.parallel_core.errors import DataError
from fivefold.parallel_core.training.corpus import (
    Piece,
    Skipped,
    longest_document,
    read_pieces,
)

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)

_SPAN = 1 << 64


@dataclass(frozen=True, slots=True)
class Assigned:
    """A piece of text and where it goes.

    Args:
        piece: the text.
        split: ``"train"``, ``"heldout"``, or None for a copy of text that came before.
        num_bytes: its length in UTF-8.
    """

    piece: Piece
    split: str | None
    num_bytes: int


class Corpus:
    """The distinct documents of some files, each in the training or in the held-out split.

    A document's side follows from the hash of its text alone: its first 64 bits, as a number in
    [0, 1), against ``heldout_fraction``. So it stays where it is when files come, go or move, and
    the same text is never on both sides. In a corpus so small that one side would stay empty, the
    document nearest to the threshold changes sides.

    Building one reads all files once, to find copies and unreadable files; iterating reads them
    again. Memory: the hash of each document (about 150 bytes), never their texts.

    Args:
        files: where to read.
        heldout_fraction: expected share of the documents to hold out, in [0, 1).

    Attributes:
        files: those that can be read.
        skipped: what cannot.
        num_duplicates: pieces left out because an equal one came before.
        fingerprint: changes with the text and the split, not with where the files are.

    Raises:
        DataError: no text at all, or a single document and a held-out split is asked for.
    """

    def __init__(self, files: Sequence[Path], heldout_fraction: float):
        self.files: list[Path] = []
        self.skipped = Skipped()
        self.num_duplicates = 0
        self._longest = longest_document(len(files))
        seen = self._survey(files)
        if not seen:
            raise DataError(_nothing(files, self.skipped))
        if heldout_fraction and len(seen) == 1:
            raise DataError(
                f"all the text is one document ({self.files[0]}), so none can be held out: give "
                "more files or a longer one, or set heldout_fraction to 0"
            )
        self._limit = _threshold(seen, heldout_fraction)
        self.fingerprint = self._fingerprint(seen)

    def __iter__(self) -> Iterator[Assigned]:
        """Every piece of text in order, copies included.

        Raises:
            DataError: at the end, if the files are no longer what they were.
        """
        seen: dict[bytes, None] = {}
        for file in self.files:
            for piece in read_pieces(file, self._longest, Skipped()):
                digest, num_bytes = _hash(piece.text)
                copy = digest in seen
                seen[digest] = None
                yield Assigned(piece, None if copy else self._side(digest), num_bytes)
        if self._fingerprint(seen) != self.fingerprint:
            raise DataError("the data files changed while they were read: run again")

    def _survey(self, files: Sequence[Path]) -> dict[bytes, None]:
        """The hashes of all distinct pieces, in order (a dict keeps it, a set does not)."""
        seen: dict[bytes, None] = {}
        for file in files:
            try:
                pieces = read_pieces(file, self._longest, self.skipped)
                digests = [_hash(piece.text)[0] for piece in pieces]
            except (OSError, UnicodeError) as error:
                self.skipped.add(f"{file}: {error}", files=1)
                continue
            self.files.append(file)
            before = len(seen)
            seen.update(dict.fromkeys(digests))
            self.num_duplicates += len(digests) - (len(seen) - before)
        return seen

    def _side(self, digest: bytes) -> str:
        return HELDOUT if _position(digest) < self._limit else TRAIN

    def _fingerprint(self, seen: dict[bytes, None]) -> str:
        total = hashlib.sha256(str(self._limit).encode())
        for digest in seen:
            total.update(digest)
        return total.hexdigest()


def _hash(text: str) -> tuple[bytes, int]:
    content = text.encode()
    return hashlib.sha256(content).digest()[:16], len(content)


def _position(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


def _threshold(seen: dict[bytes, None], fraction: float) -> int:
    """Positions below this are held out: ``fraction`` of the span, moved to leave no side empty."""
    if not fraction:
        return 0
    positions = [_position(digest) for digest in seen]
    return min(max(int(fraction * _SPAN), min(positions) + 1), max(positions))


def _nothing(files: Sequence[Path], skipped: Skipped) -> str:
    found = f"{len(files)} file{'s' * (len(files) != 1)} ({files[0]}, ..)" if files else "no files"
    why = f"; {skipped.files} files and {skipped.lines} lines could not be used, the first: "
    return f"no text to train on in {found}" + (
        f"{why}{skipped.reason}" if skipped.reason else ": all are empty"
    )
