"""Hits of HHsearch and HHblits (.hhr files), for templates."""

import re
from dataclasses import dataclass

from fivefold.fold.errors import FoldDataError

_SUMMARY = re.compile(r"Aligned_cols=(\d+).*Sum_probs=([-+.\deE]+)")
# Name of a sequence, where the row begins, letters, where it ends, length of the whole sequence.
_ROW = re.compile(r"^([QT]) (\S+)\s+(\d+)\s+([A-Za-z.-]+)\s+(\d+)\s+\((\d+)\)")
_ANNOTATIONS = ("Consensus", "ss_dssp", "ss_pred", "ss_conf", "sa_dssp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A sequence that was found, aligned to the part of the query that it covers.

    Attributes:
        rank: in the file, from 1.
        name: the whole line that describes it; of PDB entries it begins with entry and chain.
        aligned_columns: of its states.
        sum_probs: sum of the probabilities that its columns are aligned rightly; hits are sorted
            by it.
        query: aligned letters and gaps of the query.
        sequence: of the hit, as long.
        query_index: for each column the place in the query from 0; -1 is a gap.
        index: the same in the hit.
    """

    rank: int
    name: str
    aligned_columns: int
    sum_probs: float
    query: str
    sequence: str
    query_index: tuple[int, ...]
    index: tuple[int, ...]


def parse_hhr(text: str) -> list[Hit]:
    """All hits of a file, in its order.

    Raises:
        FoldDataError: a hit without a summary, or whose rows do not fit.
    """
    blocks = re.split(r"^No (?=\d+\s*$)", text, flags=re.MULTILINE)[1:]
    return [_hit(block.splitlines()) for block in blocks]


def _hit(lines: list[str]) -> Hit:
    rank = int(lines[0])
    summary = next((found for line in lines[1:4] if (found := _SUMMARY.search(line))), None)
    if summary is None or len(lines) < 2 or not lines[1].startswith(">"):
        raise FoldDataError(f"hit {rank} has no line with Aligned_cols and Sum_probs")
    letters = {"Q": "", "T": ""}
    index: dict[str, list[int]] = {"Q": [], "T": []}
    for line in lines:
        row = _ROW.match(line)
        if row is None or row[2] in _ANNOTATIONS:
            continue
        side, start = row[1], int(row[3]) - 1
        letters[side] += row[4]
        index[side] += _numbered(row[4], start)
        counted = sum(letter != "-" for letter in row[4])
        if counted != int(row[5]) - start:
            raise FoldDataError(
                f"hit {rank} has a row of {counted} residues that is numbered {row[3]} to {row[5]}"
            )
    if len(letters["Q"]) != len(letters["T"]):
        raise FoldDataError(
            f"hit {rank} has {len(letters['Q'])} columns of the query and {len(letters['T'])} "
            "of its own"
        )
    return Hit(
        rank=rank,
        name=lines[1][1:],
        aligned_columns=int(summary[1]),
        sum_probs=float(summary[2]),
        query=letters["Q"],
        sequence=letters["T"],
        query_index=tuple(index["Q"]),
        index=tuple(index["T"]),
    )


def _numbered(letters: str, start: int) -> list[int]:
    numbers = []
    for letter in letters:
        numbers.append(-1 if letter == "-" else start)
        start += letter != "-"
    return numbers
