"""One structure file: which of its chains are kept, with what, and why others are not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.fold.data.alignments import SUFFIXES as ALIGNMENT_SUFFIXES
from fivefold.fold.data.alignments import (
    Alignment,
    EmptyAlignmentError,
    join,
    query_only,
    read_alignment,
    sequence_of,
)
from fivefold.fold.data.structures import Chain, Structure, read_structure
from fivefold.fold.errors import FoldDataError

HITS = (".hhr",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Which chains are kept; the limits are those of MLPerf's reference.

    Attributes:
        max_resolution: in angstrom, exclusive; structures without one are kept.
        max_single_residue: share of a chain that one kind of residue may be.
        min_seen: residues with an alpha carbon.
        need_alignment: leave out chains without one; else they are their own alignment.
    """

    max_resolution: float = 9.0
    max_single_residue: float = 0.8
    min_seen: int = 4
    need_alignment: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What became of one file, or of a shard of them.

    Attributes:
        chains: one record each of those that were kept.
        dropped: names and reasons of what was left out.
        notes: names and what is unusual about chains that were kept.
    """

    chains: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Append what another has."""
        self.chains.extend(other.chains)
        self.dropped.extend(other.dropped)
        self.notes.extend(other.notes)


def read_file(
    path: Path,
    alignments: str | Path | None,
    templates: str | Path | None,
    filters: Filters,
) -> tuple[Found, dict[str, Any]]:
    """What became of a file's chains, and the arrays of those that are kept, by name.

    Args:
        path: of the structure.
        alignments: folder of alignments and hits; see ``data.prepare.prepare``.
        templates: folder of structures for templates.
        filters: what is kept.
    """
    found = Found()
    arrays: dict[str, Any] = {}
    try:
        structure = read_structure(path)
    except FoldDataError as error:
        found.dropped.append({"name": path.name, "reason": str(error)})
        return found, {}
    for chain in structure.chains.values():
        name = f"{structure.name}_{chain.name}"
        reason = _reason_to_drop(structure, chain, filters)
        try:
            alignment, empty = (None, []) if reason else _alignment_of(name, chain, alignments)
        except FoldDataError as error:
            reason = str(error)
        if not reason and alignment is None and filters.need_alignment:
            reason = f"there is no alignment {name} in {alignments}"
        if reason:
            found.dropped.append({"name": name, "reason": reason})
            continue
        _note(found, name, chain, alignment is None, empty)
        alignment = alignment or query_only(chain.sequence)
        found.chains.append(_record(name, structure, chain, alignment))
        arrays[f"{name}/positions"] = chain.positions
        arrays[f"{name}/mask"] = chain.mask.astype(np.uint8)
        arrays[f"{name}/classes"] = alignment.classes
        arrays[f"{name}/deletions"] = alignment.deletions
        if templates is not None:
            hits = alignment_files(alignments, name, HITS)
            limit = structure.release_date or None
            arrays |= _templates(found, name, chain.sequence, hits, templates, limit)
    return found, arrays


def _templates(
    found: Found,
    name: str,
    sequence: str,
    hits: list[Path],
    structures: str | Path,
    released_before: str | None,
) -> dict[str, Any]:
    """Arrays of a chain's templates; what cannot be read is noted."""
    # Here, as templates need torch, which takes a process seconds that has none to read.
    from fivefold.fold.data.templates import TemplateFilters, find_templates

    limits = TemplateFilters(released_before=released_before)
    arrays: dict[str, Any] = {}
    for path in hits[:1]:
        try:
            made = find_templates(path, sequence, structures, limits)
        except FoldDataError as error:
            found.notes.append({"name": name, "note": str(error)})
            continue
        for each in made.dropped:
            found.notes.append(
                {"name": name, "note": f"no template {each['name']}: {each['reason']}"}
            )
        if made.templates is not None:
            arrays[f"{name}/template_aatype"] = made.templates.aatype.numpy()
            arrays[f"{name}/template_positions"] = made.templates.positions.numpy()
            arrays[f"{name}/template_mask"] = made.templates.mask.numpy()
    return arrays


def _reason_to_drop(structure: Structure, chain: Chain, filters: Filters) -> str:
    seen = int(chain.mask[:, 1].sum())
    most = max(chain.sequence.count(letter) for letter in set(chain.sequence))
    if structure.resolution >= filters.max_resolution:
        return f"resolution {structure.resolution} Å, below {filters.max_resolution} is kept"
    if seen < filters.min_seen:
        return f"{seen} residues have an alpha carbon, at least {filters.min_seen} are needed"
    if most > filters.max_single_residue * len(chain.sequence):
        return f"{most} of {len(chain.sequence)} residues are of one kind"
    return ""


def _note(found: Found, name: str, chain: Chain, alone: bool, empty: list[str]) -> None:
    found.notes.extend({"name": name, "note": f"left out: {each}"} for each in empty)
    if "X" in chain.sequence:
        places = [str(i + 1) for i, letter in enumerate(chain.sequence) if letter == "X"]
        note = f"unknown residues at {', '.join(places[:10])} ({len(places)} in all)"
        found.notes.append({"name": name, "note": note})
    if alone:
        found.notes.append({"name": name, "note": "no alignment; the chain is its own"})


def alignment_files(
    folder: str | Path | None, pattern: str, suffixes: tuple[str, ...] = ALIGNMENT_SUFFIXES
) -> list[Path]:
    """Files of alignments under a name, in a folder of it or beside others, by their suffixes."""
    if folder is None:
        return []
    paths = [p for place in sorted(Path(folder).glob(pattern)) for p in _within(place)]
    return [p for p in paths if p.name.removesuffix(".gz").endswith(suffixes)]


def _within(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else [place]


def _alignment_of(
    name: str, chain: Chain, folder: str | Path | None
) -> tuple[Alignment | None, list[str]]:
    """A chain's alignment, None where no file holds a sequence, and what says which do not."""
    parts, empty = [], []
    for path in alignment_files(folder, name) + alignment_files(folder, f"{name}.*"):
        try:
            parts.append(read_alignment(path))
        except EmptyAlignmentError as error:
            empty.append(str(error))
    if not parts:
        return None, empty
    alignment = join(parts)
    theirs = sequence_of(alignment)
    same = len(theirs) == len(chain.sequence) and all(
        a == b or "X" in (a, b) for a, b in zip(theirs, chain.sequence, strict=True)
    )
    if not same:
        raise FoldDataError(f"its alignment is of {theirs!r}, the chain is {chain.sequence!r}")
    return alignment, empty


def _record(name: str, structure: Structure, chain: Chain, alignment: Alignment) -> dict[str, Any]:
    return {
        "name": name,
        "sequence": chain.sequence,
        "num_seen": int(chain.mask[:, 1].sum()),
        "num_rows": len(alignment),
        "resolution": structure.resolution,
        "method": structure.method,
        "release_date": structure.release_date,
    }
