"""The facts of ``residues.py`` as tensors that are looked up by the number of an amino acid.

Legend: A 21 amino acids (the last is unknown), P 37 kinds of atoms, Q 14 atoms, G 8 rigid groups.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from fivefold.fold.geometry import residues as facts
from fivefold.fold.geometry.residues import ATOMS, MAX_ATOMS, NUM_GROUPS, NUM_RESIDUE_TYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Facts by amino acid; everything of the unknown one is 0 unless said.

    Attributes:
        atom37_of_atom14: (A, 14) number among the 37 of each own atom, 0 where there is none.
        atom14_of_atom37: (A, 37) the way back.
        atom14_exists: (A, 14) 1 where there is such an atom.
        atom37_exists: (A, 37)
        group_of_atom14: (A, 14) rigid group that an atom moves with.
        position_of_atom14: (A, 14, 3) in that group's frame, in angstrom.
        frames: (A, 8, 4, 4) from a torsion's frame at angle 0 to its parent's; unit matrices
            where there is no such torsion.
        chi_atoms: (A, 4, 4) numbers among the 37 of the atoms of the side chain's torsions.
        chi_exists: (A, 4)
        chi_pi_periodic: (A, 4)
        group_base_atoms: (A, 8, 3) numbers among the 37 of the three atoms that span a group.
        group_exists: (A, 8) where these are known; omega and phi have none.
        group_is_ambiguous: (A, 8) groups that move when ambiguous atoms change names.
        atom14_is_ambiguous: (A, 14)
        swapped_atom14: (A, 14) number of the atom that may have this one's name.
        radius_of_atom14: (A, 14) van der Waals, in angstrom.
    """

    atom37_of_atom14: Tensor
    atom14_of_atom37: Tensor
    atom14_exists: Tensor
    atom37_exists: Tensor
    group_of_atom14: Tensor
    position_of_atom14: Tensor
    frames: Tensor
    chi_atoms: Tensor
    chi_exists: Tensor
    chi_pi_periodic: Tensor
    group_base_atoms: Tensor
    group_exists: Tensor
    group_is_ambiguous: Tensor
    atom14_is_ambiguous: Tensor
    swapped_atom14: Tensor
    radius_of_atom14: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Tables":
        """The same on a device, numbers that are not counts in ``dtype``."""
        return Tables(**{field.name: _to(getattr(self, field.name), device, dtype)
                         for field in fields(self)})  # fmt: skip


@cache
def tables(device: torch.device, dtype: torch.dtype = torch.float32) -> Tables:
    """The tables on a device, made once."""
    return _made().to(device, dtype)


def _to(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)


@cache
def _made() -> Tables:
    made = _Maker()
    for number, residue in enumerate(facts.residues()):
        made.atoms(number, residue)
        made.torsions(number, residue)
        made.groups(number, residue)
        made.names(number, residue)
    return Tables(**made.tensors)


class _Maker:
    """Fills the tables, amino acid by amino acid."""

    def __init__(self) -> None:
        a, p, q, g = NUM_RESIDUE_TYPES, len(ATOMS), MAX_ATOMS, NUM_GROUPS

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        def counts(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        self.tensors: dict[str, Tensor] = {
            "atom37_of_atom14": counts(a, q),
            "atom14_of_atom37": counts(a, p),
            "atom14_exists": zeros(a, q),
            "atom37_exists": zeros(a, p),
            "group_of_atom14": counts(a, q),
            "position_of_atom14": zeros(a, q, 3),
            "frames": torch.eye(4, dtype=torch.float64).repeat(a, g, 1, 1),
            "chi_atoms": counts(a, 4, 4),
            "chi_exists": zeros(a, 4),
            "chi_pi_periodic": zeros(a, 4),
            "group_base_atoms": counts(a, g, 3),
            "group_exists": zeros(a, g),
            "group_is_ambiguous": zeros(a, g),
            "atom14_is_ambiguous": zeros(a, q),
            "swapped_atom14": torch.arange(q).repeat(a, 1),
            "radius_of_atom14": zeros(a, q),
        }
        # The backbone of an unknown residue is still a backbone.
        self._backbone(slice(None))

    def _backbone(self, number: int | slice) -> None:
        base, exists = self.tensors["group_base_atoms"], self.tensors["group_exists"]
        for group, names in ((0, ("C", "CA", "N")), (3, ("CA", "C", "O"))):
            base[number, group] = torch.tensor([ATOMS.index(name) for name in names])
            exists[number, group] = 1

    def atoms(self, number: int, residue: facts.Residue) -> None:
        """Which atoms there are and where they lie in their groups."""
        t = self.tensors
        for place, atom in enumerate(residue.atoms):
            kind = ATOMS.index(atom.name)
            t["atom37_of_atom14"][number, place] = kind
            t["atom14_of_atom37"][number, kind] = place
            t["atom14_exists"][number, place] = 1
            t["atom37_exists"][number, kind] = 1
            t["group_of_atom14"][number, place] = atom.group
            t["position_of_atom14"][number, place] = torch.tensor(atom.position).double()
            t["radius_of_atom14"][number, place] = facts.RADIUS[atom.name[0]]

    def torsions(self, number: int, residue: facts.Residue) -> None:
        """Which torsions the side chain has."""
        t = self.tensors
        for chi, names in enumerate(residue.chi):
            t["chi_atoms"][number, chi] = torch.tensor([ATOMS.index(name) for name in names])
            t["chi_exists"][number, chi] = 1
            t["chi_pi_periodic"][number, chi] = float(chi in residue.chi_pi_periodic)
            t["group_base_atoms"][number, 4 + chi] = t["chi_atoms"][number, chi, 1:]
            t["group_exists"][number, 4 + chi] = 1

    def groups(self, number: int, residue: facts.Residue) -> None:
        """Where the frame of each torsion lies in its parent's."""
        at = {atom.name: torch.tensor(atom.position).double() for atom in residue.atoms}
        frames = self.tensors["frames"][number]
        x_axis = torch.tensor([1.0, 0.0, 0.0]).double()
        frames[2] = _frame(at["N"] - at["CA"], x_axis, at["N"])
        frames[3] = _frame(at["C"] - at["CA"], at["CA"] - at["N"], at["C"])
        for chi, (first, second, third, _) in enumerate(residue.chi):
            if chi == 0:
                frames[4] = _frame(at[third] - at[second], at[first] - at[second], at[third])
            else:  # the parent's frame begins at the second atom
                frames[4 + chi] = _frame(at[third], -x_axis, at[third])

    def names(self, number: int, residue: facts.Residue) -> None:
        """Which atoms may change names, and the group that then moves: the last torsion's."""
        t = self.tensors
        for one, other in residue.swaps:
            i, j = residue.index(one), residue.index(other)
            t["swapped_atom14"][number, i], t["swapped_atom14"][number, j] = j, i
            t["atom14_is_ambiguous"][number, [i, j]] = 1
            t["group_is_ambiguous"][number, 3 + len(residue.chi)] = 1


def _frame(x: Tensor, near_y: Tensor, origin: Tensor) -> Tensor:
    """A 4 × 4 transform whose first axis is along x and whose second is as near as can be."""
    x = x / x.norm()
    y = near_y - (near_y @ x) * x
    y = y / y.norm()
    frame = torch.eye(4, dtype=torch.float64)
    frame[:3] = torch.stack((x, y, torch.linalg.cross(x, y), origin), 1)
    return frame


@cache
def distance_bounds(
    overlap_tolerance: float, deviations: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Least and greatest distances (A, 14, 14), in angstrom, between atoms of one residue.

    Atoms that are bonded, or have a bonded neighbour in common, keep the distance that bond lengths
    and angles give them; others keep out of each other's radii.

    Args:
        overlap_tolerance: by which radii may overlap, in angstrom.
        deviations: how many deviations a bonded distance may be off.
        device: where to put them.
    """
    lower = torch.zeros(NUM_RESIDUE_TYPES, MAX_ATOMS, MAX_ATOMS, dtype=torch.float64)
    upper = torch.zeros_like(lower)
    for number, residue in enumerate(facts.residues()):
        radius = torch.tensor([facts.RADIUS[atom.name[0]] for atom in residue.atoms]).double()
        count = len(radius)
        apart = 1 - torch.eye(count, dtype=torch.float64)
        lower[number, :count, :count] = (radius[:, None] + radius - overlap_tolerance) * apart
        upper[number, :count, :count] = 1e10 * apart
        for one, other, length, deviation in (*residue.bonds, *_opposite_edges(residue)):
            i, j = residue.index(one), residue.index(other)
            for pair in ((i, j), (j, i)):
                lower[number][pair] = length - deviations * deviation
                upper[number][pair] = length + deviations * deviation
    return lower.float().to(device), upper.float().to(device)


def _opposite_edges(residue: facts.Residue) -> list[tuple[str, str, float, float]]:
    """Of each bond angle the distance between its ends and its deviation."""
    bonds = {frozenset((one, other)): (r, s) for one, other, r, s in residue.bonds}
    edges = []
    for one, middle, other, angle, spread in residue.angles:
        (a, sa), (b, sb) = bonds[frozenset((one, middle))], bonds[frozenset((middle, other))]
        angle, spread = math.radians(angle), math.radians(spread)
        c = math.sqrt(a * a + b * b - 2 * a * b * math.cos(angle))
        # Errors of lengths and angle are taken as independent.
        parts = (
            a * b * math.sin(angle) * spread,
            (a - b * math.cos(angle)) * sa,
            (b - a * math.cos(angle)) * sb,
        )
        edges.append((one, other, c, math.hypot(*parts) / c))
    return edges
