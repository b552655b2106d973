"""What is to be predicted: of FASTA files, alignments or structures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fivefold.fold.data.alignments import (
    join,
    parse_fasta,
    query_only,
    read_alignment,
    sequence_of,
)
from fivefold.fold.data.features import Example
from fivefold.fold.data.structures import read_structure
from fivefold.fold.errors import FoldDataError


def from_fasta(path: str | Path) -> Iterator[Example]:
    """Each sequence of a file by itself.

    Raises:
        FoldDataError: no such file, no sequence in it, or letters that are none of residues.
    """
    try:
        records = parse_fasta(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FoldDataError(f"{path} cannot be read: {error}") from error
    if not records:
        raise FoldDataError(f"{path} holds no sequence")
    for number, (name, letters) in enumerate(records):
        sequence = letters.upper().rstrip("*")
        try:
            alignment = query_only(sequence)
        except FoldDataError as error:
            raise FoldDataError(f"{path}, {name!r}: {error}") from error
        yield Example(
            name=file_name(name) or f"sequence-{number + 1}",
            sequence=sequence_of(alignment),
            alignment=alignment,
        )


def from_alignments(paths: Sequence[str | Path]) -> Example:
    """The query of alignments, which are joined.

    Raises:
        FoldDataError: a file cannot be read, or is of another query.
    """
    alignment = join([read_alignment(path) for path in paths])
    return Example(
        name=file_name(Path(paths[0]).name.split(".")[0]),
        sequence=sequence_of(alignment),
        alignment=alignment,
    )


def from_structure(
    path: str | Path, chains: Sequence[str] = (), alignments: Sequence[str | Path] = ()
) -> Iterator[Example]:
    """Chains of a structure, which is kept to compare with.

    Args:
        path: of mmCIF, BinaryCIF or PDB.
        chains: names; all proteins where there are none.
        alignments: of one chain.

    Raises:
        FoldDataError: the file or a chain is not there, or there are alignments of several.
    """
    structure = read_structure(path)
    names = list(chains or structure.chains)
    if alignments and len(names) != 1:
        raise FoldDataError(
            f"alignments are of one chain, {path} has {', '.join(names)}; name it with --chain"
        )
    for name in names:
        chain = structure.chain(name)
        yield Example(
            name=f"{structure.name}_{name}",
            sequence=chain.sequence,
            alignment=join([read_alignment(each) for each in alignments])
            if alignments
            else query_only(chain.sequence),
            chain=chain,
            resolution=structure.resolution,
        )


def file_name(description: str) -> str:
    """The first word of a description, as a file may be called."""
    word = description.split(maxsplit=1)[0] if description.strip() else ""
    return re.sub(r"[^\w.-]+", "_", word).strip("._")
