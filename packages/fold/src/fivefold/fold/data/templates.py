"""Templates: structures of hits, laid over the query (supplement, section 1.2.3).

Legend: T templates, N residues of the query.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fivefold.fold.data.features import Templates
from fivefold.fold.data.hhr import Hit, parse_hhr
from fivefold.fold.data.structures import (
    SUFFIXES,
    Chain,
    read_structure,
    sequence_to_aatype,
)
from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import ATOMS, GAP


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFilters:
    """Which hits are used; the limits are AlphaFold's.

    Attributes:
        max_templates: of one query.
        released_before: year-month-day; structures of that day or later, or without a date, are
            left out. None takes all.
        min_aligned: share of the query that is aligned, exclusive.
        max_same: share of the query that a hit may be a part of, letter for letter, exclusive: the
            query itself would give its structure away.
        min_length: residues of a hit.
    """

    max_templates: int = 20
    released_before: str | None = None
    min_aligned: float = 0.1
    max_same: float = 0.95
    min_length: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundTemplates:
    """Templates of a query.

    Attributes:
        templates: best first; None where there is none.
        names: of those, as entry and chain.
        dropped: names and reasons of the hits that were looked at and left out.
    """

    templates: Templates | None
    names: list[str]
    dropped: list[dict[str, str]]


def find_templates(
    hits: Iterable[Hit] | str | Path,
    sequence: str,
    structures: str | Path,
    filters: TemplateFilters | None = None,
) -> FoundTemplates:
    """Lay the structures of hits over a query.

    Args:
        hits: of HHsearch, or its .hhr file.
        sequence: of the query, which the hits were found with.
        structures: folder with 1abc.cif and so on.
        filters: what is used.

    Raises:
        FoldDataError: the file cannot be read.
    """
    filters = filters or TemplateFilters()
    if isinstance(hits, (str, Path)):
        hits = _read(Path(hits))
    made: list[tuple[str, Templates]] = []
    dropped = []
    seen: set[str] = set()
    for hit in sorted(hits, key=lambda hit: -hit.sum_probs):
        if len(made) == filters.max_templates:
            break
        name = hit.name.split(maxsplit=1)[0]
        try:
            if name in seen:
                raise FoldDataError("a better hit is of the same chain")
            made.append((name, _template(hit, name, sequence, Path(structures), filters)))
            seen.add(name)
        except FoldDataError as error:
            dropped.append({"name": name, "reason": str(error)})
    joined = None
    if made:
        arrays = zip(*((t.aatype, t.positions, t.mask) for _, t in made), strict=True)
        aatype, positions, mask = (torch.cat(each) for each in arrays)
        joined = Templates(aatype=aatype, positions=positions, mask=mask)
    return FoundTemplates(templates=joined, names=[name for name, _ in made], dropped=dropped)


def _read(path: Path) -> list[Hit]:
    try:
        return parse_hhr(path.read_text())
    except (OSError, UnicodeDecodeError, FoldDataError) as error:
        raise FoldDataError(f"{path} cannot be read: {error}") from error


def _template(
    hit: Hit, name: str, sequence: str, structures: Path, filters: TemplateFilters
) -> Templates:
    """One template (1, N).

    Raises:
        FoldDataError: it is not to be used, with the reason.
    """
    letters = hit.sequence.replace("-", "")
    aligned = hit.aligned_columns / len(sequence)
    if aligned <= filters.min_aligned:
        raise FoldDataError(f"{aligned:.0%} of the query are aligned, {filters.min_aligned:.0%} no")
    if letters in sequence and len(letters) > filters.max_same * len(sequence):
        raise FoldDataError("it is the query itself")
    if len(letters) < filters.min_length:
        raise FoldDataError(f"{len(letters)} residues, at least {filters.min_length} are needed")
    chain = _chain(name, structures, filters)
    places = _places(letters, chain.sequence)
    own = {column: places[at] for at, column in enumerate(i for i in hit.index if i >= 0)}
    pairs = [
        (q, own[h])
        for q, h in zip(hit.query_index, hit.index, strict=True)
        if q >= 0 and h >= 0 and own[h] >= 0
    ]
    return _laid(chain, pairs, len(sequence))


def _chain(name: str, structures: Path, filters: TemplateFilters) -> Chain:
    entry, _, chain = name.partition("_")
    names = [
        f"{stem}{s}{p}" for stem in (entry.lower(), entry) for s in SUFFIXES for p in ("", ".gz")
    ]
    path = next((p for p in (structures / each for each in names) if p.is_file()), None)
    if path is None:
        raise FoldDataError(f"{structures} has no {entry.lower()} of any suffix")
    structure = read_structure(path)
    limit = filters.released_before
    if limit is not None and not "" < structure.release_date < limit:
        raise FoldDataError(f"released {structure.release_date or 'at no known date'}")
    return structure.chain(chain)


def _places(letters: str, sequence: str) -> list[int]:
    """Where each letter of a hit stands in the chain; -1 where it does not.

    Databases of hits may have a part of a chain, or residues that the entry has changed since.
    """
    start = sequence.find(letters)
    if start >= 0:
        return list(range(start, start + len(letters)))
    from biotite.sequence import ProteinSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    trace = align_optimal(
        ProteinSequence(letters),
        ProteinSequence(sequence),
        SubstitutionMatrix.std_protein_matrix(),
        gap_penalty=(-10, -1),
        terminal_penalty=False,
        max_number=1,
    )[0].trace
    both = trace[(trace >= 0).all(-1)]
    same = sum(letters[a] == sequence[b] for a, b in both)
    if same < 0.9 * len(letters):
        raise FoldDataError(
            f"{same} of the {len(letters)} residues of the hit are in its structure"
        )
    places = [-1] * len(letters)
    for a, b in both.tolist():
        places[a] = b
    return places


def _laid(chain: Chain, pairs: Sequence[tuple[int, int]], length: int) -> Templates:
    query, own = (np.array(side, np.int64) for side in zip(*pairs, strict=True)) if pairs else (
        np.zeros(0, np.int64), np.zeros(0, np.int64))  # fmt: skip
    mask = np.zeros((1, length, len(ATOMS)), np.float32)
    mask[0, query] = chain.mask[own]
    if not mask[..., 1].any():
        raise FoldDataError("no aligned residue of it was seen")
    positions = np.zeros((1, length, len(ATOMS), 3), np.float32)
    positions[0, query] = chain.positions[own]
    aatype = np.full((1, length), GAP, np.int64)
    aatype[0, query] = sequence_to_aatype(chain.sequence)[own]
    return Templates(
        aatype=torch.from_numpy(aatype),
        positions=torch.from_numpy(positions),
        mask=torch.from_numpy(mask),
    )
