"""Chains of which only atoms are listed, or atoms beside a sequence that they have to be found in.

Legend: A rows of a file, R residues with atoms.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import biotite.structure as struc
import numpy as np
from numpy.typing import NDArray

from fivefold.fold.data.structures import AtomRows, Chain, build_chain, one_letter
from fivefold.fold.errors import FoldDataError

_WRONG, _OPEN, _EXTEND = -4, -6, -1


def chains_of_atoms(
    atoms: Any, sequences: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Chain]:
    """The proteins of an array of atoms with all alternative locations.

    Args:
        atoms: of biotite, numbered by their authors.
        sequences: names of the residues of whole chains, of which some may have no atoms; of a
            chain without, the residues that have atoms are all there is.

    Raises:
        FoldDataError: atoms of residues that the sequence does not have.
    """
    chains = {}
    peptide = struc.filter_amino_acids(atoms) | (atoms.res_name == "UNK")
    for name in dict.fromkeys(str(each) for each in atoms.chain_id):
        here = atoms[(atoms.chain_id == name) & peptide]
        known = (sequences or {}).get(name)
        if not known:
            # A free amino acid would be a ligand, which a file without sequence does not say.
            here = here[np.isin(_numbered(here), _numbered(here)[here.atom_name == "CA"])]
        if len(here):
            chains[name] = _chain(name, here, known)
    return chains


def _numbered(atoms: Any) -> NDArray[np.int64]:
    """(A,) which residue, from 0: one number and insertion code are one residue."""
    keys = zip(atoms.res_id.tolist(), atoms.ins_code.tolist(), strict=True)
    seen: dict[tuple[int, str], int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)


def _chain(name: str, atoms: Any, sequence: Sequence[str] | None) -> Chain:
    number = _numbered(atoms)
    choices: list[list[str]] = [[] for _ in range(int(number.max()) + 1)]
    for residue, each in zip(number, atoms.res_name, strict=True):
        if each not in choices[residue]:
            choices[residue].append(str(each))
    keep = np.ones(len(atoms), bool)
    if sequence:
        place = _places(name, choices, sequence)
        keep, number = place[number] >= 0, place[number]
        whole = [[each] for each in sequence]
        for residue, at in enumerate(place):
            if at >= 0:
                whole[at] = choices[residue]
        choices = whole
    occupancy = atoms.occupancy if "occupancy" in atoms.get_annotation_categories() else None
    rows = AtomRows(
        residue=number,
        residue_name=atoms.res_name,
        atom_name=atoms.atom_name,
        occupancy=np.ones(len(atoms), np.float32) if occupancy is None else occupancy,
        position=atoms.coord,
    )
    return build_chain(name, choices, rows.where(keep))


def _places(name: str, seen: Sequence[Sequence[str]], sequence: Sequence[str]) -> NDArray[np.int64]:
    """(R,) where each residue stands in the sequence; -1 for ligands behind its end."""
    from biotite.sequence import ProteinSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    alphabet = ProteinSequence.alphabet
    scores = np.where(np.eye(len(alphabet), dtype=bool), 5, _WRONG).astype(np.int32)
    letters = ["".join(one_letter(each) for each in names) for names in (
        [choice[0] for choice in seen], sequence)]  # fmt: skip
    aligned = align_optimal(
        *(ProteinSequence(each) for each in letters),
        SubstitutionMatrix(alphabet, alphabet, scores),
        gap_penalty=(_OPEN, _EXTEND),
        terminal_penalty=False,
        max_number=1,
    )[0].trace
    place = np.full(len(seen), -1, np.int64)
    both = aligned[(aligned >= 0).all(-1)]
    place[both[:, 0]] = both[:, 1]
    for residue, at in both:
        if letters[0][residue] != letters[1][at]:
            raise FoldDataError(
                f"chain {name} has atoms of {seen[residue][0]} where its sequence has "
                f"{sequence[at]} at {at + 1}"
            )
    last = int(np.flatnonzero(place >= 0).max(initial=-1))
    if (place[: last + 1] < 0).any():
        lost = int(np.flatnonzero(place[: last + 1] < 0)[0])
        raise FoldDataError(
            f"chain {name} has atoms of {seen[lost][0]}, its residue {lost + 1} of {len(seen)}, "
            f"which is not in its sequence of {len(sequence)}"
        )
    return place
