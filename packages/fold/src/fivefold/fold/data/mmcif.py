"""Proteins of mmCIF files, text or binary, read with biotite."""

from collections import defaultdict
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from biotite.structure.io import pdbx

from fivefold.fold.data.observed import chains_of_atoms
from fivefold.fold.data.structures import AtomRows, Chain, Structure, build_chain

# The last that says a number counts.
_RESOLUTIONS = (
    ("refine", "ls_d_res_high"),
    ("em_3d_reconstruction", "resolution"),
    ("reflns", "d_resolution_high"),
)
_PEPTIDE = "peptide"
_FIELDS = ["auth_asym_id", "label_seq_id", "label_entity_id", "occupancy"]


def from_text(file: IO[str], name: str) -> Structure:
    """The first model of a text file."""
    return _structure(pdbx.CIFFile.read(file), name)


def from_binary(file: IO[bytes], name: str) -> Structure:
    """The first model of a binary file."""
    return _structure(pdbx.BinaryCIFFile.read(file), name)


def _structure(file: Any, name: str) -> Structure:
    block = file.block
    polymers = _polymers(block)
    atoms = pdbx.get_structure(
        file,
        model=1,
        altloc="all",
        extra_fields=_FIELDS if polymers else ["occupancy"] * _has(block, "atom_site", "occupancy"),
        use_author_fields=not polymers,
    )
    dates = _column(block, "pdbx_audit_revision_history", "revision_date")
    return Structure(
        name=name,
        chains=_chains(polymers, atoms) if polymers else chains_of_atoms(atoms),
        method=",".join(_column(block, "exptl", "method")).lower(),
        resolution=_resolution(block),
        release_date=min(dates, default=""),
    )


def _has(block: Any, category: str, column: str) -> bool:
    return category in block and column in block[category]


def _column(block: Any, category: str, column: str) -> list[str]:
    if not _has(block, category, column):
        return []
    return [str(value) for value in block[category][column].as_array(str)]


def _resolution(block: Any) -> float:
    found = 0.0
    for category, column in _RESOLUTIONS:
        for value in _column(block, category, column)[:1]:
            try:
                found = float(value)
            except ValueError:  # "?" and "."
                continue
    return found


def _polymers(block: Any) -> dict[str, list[list[str]]]:
    """Of each protein's chain, as the file counts them, the possible names of its residues."""
    if not (_has(block, "entity_poly_seq", "mon_id") and _has(block, "struct_asym", "id")):
        return {}
    types = dict(
        zip(_column(block, "chem_comp", "id"), _column(block, "chem_comp", "type"), strict=True)
    )
    residues = _residues_of_entities(block)
    chains = {}
    for chain, entity in zip(
        _column(block, "struct_asym", "id"),
        _column(block, "struct_asym", "entity_id"),
        strict=True,
    ):
        names = residues.get(entity, [])
        if any(_PEPTIDE in types.get(n, "").lower() for choice in names for n in choice):
            chains[chain] = names
    return chains


def _residues_of_entities(block: Any) -> Mapping[str, list[list[str]]]:
    found: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for entity, number, name in zip(
        _column(block, "entity_poly_seq", "entity_id"),
        _column(block, "entity_poly_seq", "num"),
        _column(block, "entity_poly_seq", "mon_id"),
        strict=True,
    ):
        found[entity].setdefault(int(number), []).append(name)
    return {e: [names for _, names in sorted(of.items())] for e, of in found.items()}


def _chains(polymers: Mapping[str, list[list[str]]], atoms: Any) -> dict[str, Chain]:
    chains: dict[str, Chain] = {}
    for label, choices in polymers.items():
        here = atoms[atoms.chain_id == label]
        if not len(here):
            continue
        author = str(here.auth_asym_id[0])
        # Authors may give two molecules one name; the file's own names are all different.
        name = author if author not in chains else label
        rows = AtomRows(
            residue=here.label_seq_id.astype(np.int64) - 1,
            residue_name=here.res_name,
            atom_name=here.atom_name,
            occupancy=here.occupancy.astype(np.float32),
            position=here.coord,
        )
        chains[name] = build_chain(name, choices, rows)
    return chains
