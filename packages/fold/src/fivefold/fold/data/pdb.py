"""Proteins of PDB files, read with biotite; of the header what biotite leaves aside."""

from collections import defaultdict
from datetime import datetime
from typing import IO

from biotite.structure.io.pdb import PDBFile

from fivefold.fold.data.observed import chains_of_atoms
from fivefold.fold.data.structures import Structure


def from_text(file: IO[str], name: str) -> Structure:
    """The first model of a file.

    Where the file has SEQRES records these are the sequences, and residues are found in them by
    alignment; else the sequence is that of the residues with atoms.
    """
    pdb = PDBFile.read(file)
    atoms = pdb.get_structure(model=1, altloc="all", extra_fields=["occupancy"])
    return Structure(
        name=name,
        chains=chains_of_atoms(atoms, _sequences(pdb.lines)),
        method=" ".join(_fields(pdb.lines, "EXPDTA")).strip().lower(),
        resolution=_resolution(pdb.lines),
        release_date=_release_date(pdb.lines),
    )


def _fields(lines: list[str], record: str) -> list[str]:
    return [line[10:].strip() for line in lines if line.startswith(record)]


def _sequences(lines: list[str]) -> dict[str, list[str]]:
    sequences: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line.startswith("SEQRES"):
            sequences[line[11].strip()] += line[19:].split()
    return sequences


def _resolution(lines: list[str]) -> float:
    for line in lines:
        if line.startswith("REMARK   2 RESOLUTION."):
            try:
                return float(line[22:].split()[0])
            except ValueError:  # "NOT APPLICABLE."
                return 0.0
    return 0.0


def _release_date(lines: list[str]) -> str:
    dates = []
    for line in lines:
        if line.startswith("REVDAT") and line[13:22].strip():
            dates.append(datetime.strptime(line[13:22], "%d-%b-%y"))
    return min(dates).strftime("%Y-%m-%d") if dates else ""
