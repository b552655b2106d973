"""What an amino acid is made of: names of atoms, idealised positions, torsions, bonds.

The numbers lie in ``residues.json``: positions of atoms in the frame of the torsion that moves them
(Jumper et al. 2021, supplement, section 1.8.4 and table 2) and mean bond lengths and angles with
their deviations (Engh and Huber, International Tables for Crystallography F, 2001, chapter 18.3).

An amino acid has a number, its place in ``LETTERS``; 20 is unknown, and in alignments 21 is a gap
and 22 a masked place. An atom has a number among the 37 of ``ATOMS`` and one among at most 14 of
its own amino acid. Torsions are counted omega, phi, psi, chi1 to chi4; the eight rigid groups are
the backbone and what each of the seven torsions turns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

LETTERS = "ARNDCQEGHILKMFPSTWYV"
UNKNOWN, GAP, MASKED = 20, 21, 22
NUM_MSA_CLASSES = 23
NUM_RESIDUE_TYPES = 21
NUM_GROUPS = 8
NUM_TORSIONS = 7

ATOMS = (
    *("N", "CA", "C", "CB", "O", "CG", "CG1", "CG2", "OG", "OG1", "SG", "CD", "CD1"),
    *("CD2", "ND1", "ND2", "OD1", "OD2", "SD", "CE", "CE1", "CE2", "CE3", "NE", "NE1"),
    *("NE2", "OE1", "OE2", "CH2", "NH1", "NH2", "OH", "CZ", "CZ2", "CZ3", "NZ", "OXT"),
)
"""The 37 kinds of heavy atoms; OXT ends a chain and belongs to no amino acid."""

MAX_ATOMS = 14
RADIUS: Mapping[str, float] = {"C": 1.7, "N": 1.55, "O": 1.52, "S": 1.8}
"""Van der Waals radii of the elements, in angstrom."""

# Between one residue and the next: the value and its deviation; lengths in angstrom.
C_N_LENGTH = (1.329, 0.014)
C_N_LENGTH_BEFORE_PROLINE = (1.341, 0.016)
C_N_CA_COSINE = (-0.5203, 0.0353)
CA_C_N_COSINE = (-0.4473, 0.0311)
CA_CA_DISTANCE = 3.80209737096


@dataclass(frozen=True, kw_only=True, slots=True)
class Atom:
    """An atom of an amino acid.

    Attributes:
        name: one of ``ATOMS``.
        group: which of the eight rigid groups it moves with.
        position: in the frame of that group, in angstrom.
    """

    name: str
    group: int
    position: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Residue:
    """One of the twenty amino acids.

    Attributes:
        name: of three letters.
        letter: of ``LETTERS``.
        atoms: at most 14, backbone first.
        chi: names of the four atoms of each side-chain torsion.
        chi_pi_periodic: torsions that look the same after half a turn.
        swaps: pairs of atoms whose names may be exchanged.
        bonds: two atoms, length and deviation in angstrom.
        angles: three atoms, angle and deviation in degrees.
    """

    name: str
    letter: str
    atoms: tuple[Atom, ...]
    chi: tuple[tuple[str, ...], ...]
    chi_pi_periodic: tuple[int, ...]
    swaps: tuple[tuple[str, str], ...]
    bonds: tuple[tuple[str, str, float, float], ...]
    angles: tuple[tuple[str, str, str, float, float], ...]

    def index(self, atom: str) -> int:
        """Number of an atom among those of this amino acid."""
        return [each.name for each in self.atoms].index(atom)


@cache
def residues() -> tuple[Residue, ...]:
    """The twenty amino acids in the order of ``LETTERS``."""
    text = files("fivefold.fold.geometry").joinpath("residues.json").read_text(encoding="utf-8")
    read = {entry["letter"]: (name, entry) for name, entry in json.loads(text).items()}
    return tuple(_residue(*read[letter]) for letter in LETTERS)


def _residue(name: str, entry: Mapping[str, object]) -> Residue:
    atoms = {
        atom: (int(group), tuple(position))
        for atom, (group, *position) in entry["atoms"].items()  # type: ignore[attr-defined]
    }
    lists = {
        key: tuple(tuple(item) for item in entry[key])  # type: ignore[attr-defined]
        for key in ("chi", "swaps", "bonds", "angles")
    }
    return Residue(
        name=name,
        letter=str(entry["letter"]),
        atoms=tuple(Atom(name=a, group=g, position=p) for a, (g, p) in atoms.items()),
        chi_pi_periodic=tuple(entry["chi_pi_periodic"]),  # type: ignore[arg-type]
        **lists,
    )


@cache
def number_of() -> Mapping[str, int]:
    """Three-letter names to numbers, in the order of ``LETTERS``."""
    return {residue.name: number for number, residue in enumerate(residues())}
