"""Chains of mmCIF and PDB files as arrays of AlphaFold's 37 kinds of atoms.

Legend: N residues of the sequence, seen or not; P 37 kinds of atoms; A rows of a file.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import ATOMS, LETTERS, UNKNOWN

_KIND = {name: number for number, name in enumerate(ATOMS)}
_SELENIUM = {"SE": "SD"}
_NH1, _NH2, _CD = _KIND["NH1"], _KIND["NH2"], _KIND["CD"]
SUFFIXES = (".cif", ".mmcif", ".bcif", ".pdb", ".ent")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """One protein chain.

    Attributes:
        name: that its authors gave it.
        sequence: one letter a residue of what was in the experiment, seen or not; X is unknown.
        positions: (N, 37, 3) float32, in angstrom; 0 where an atom was not seen.
        mask: (N, 37) float32, 1 where an atom was seen.
    """

    name: str
    sequence: str
    positions: NDArray[np.float32]
    mask: NDArray[np.float32]

    @property
    def aatype(self) -> NDArray[np.int64]:
        """(N,) numbers of amino acids, 20 unknown."""
        return sequence_to_aatype(self.sequence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What a file says of its first model.

    Attributes:
        name: of the file, without what follows the first dot.
        chains: the proteins among them, by name, in the order of the file.
        method: of the experiment, in lower case; empty where the file does not say.
        resolution: in angstrom, 0 where there is none.
        release_date: the oldest, as year-month-day; empty where the file does not say.
    """

    name: str
    chains: Mapping[str, Chain]
    method: str = ""
    resolution: float = 0.0
    release_date: str = ""

    def chain(self, name: str) -> Chain:
        """A chain by name.

        Raises:
            FoldDataError: there is none of that name.
        """
        if name not in self.chains:
            raise FoldDataError(
                f"{self.name} has no protein chain {name!r}; it has {', '.join(self.chains)}"
            )
        return self.chains[name]


def sequence_to_aatype(sequence: str) -> NDArray[np.int64]:
    """(N,) numbers of the letters of a sequence; what is no amino acid is 20, unknown."""
    numbers = np.full(256, UNKNOWN, np.int64)
    numbers[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))
    return numbers[np.frombuffer(sequence.encode("ascii", "replace"), np.uint8)]


def read_structure(path: str | Path) -> Structure:
    """Read .cif, .bcif, .pdb or .ent, packed with gzip (.gz) or not.

    Raises:
        FoldDataError: no such file, no such format, damaged, or without a protein.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise FoldDataError(f"{path} cannot be read: {error}") from error
    return parse_structure(data, format_of(path), path.name.split(".")[0])


def format_of(path: Path) -> str:
    """The suffix that says what a structure file is, without .gz.

    Raises:
        FoldDataError: it is none.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in SUFFIXES:
        raise FoldDataError(f"{path} is none of {', '.join(SUFFIXES)}, packed as .gz or not")
    return suffix.lower()


def parse_structure(data: bytes, suffix: str, name: str) -> Structure:
    """The same of what is already in memory.

    Args:
        data: of the file.
        suffix: one of ``SUFFIXES``.
        name: for the structure and for errors.

    Raises:
        FoldDataError: damaged, or without a protein.
    """
    # On first use only: biotite takes a second, and help and configuration need none of it.
    from fivefold.fold.data import mmcif, pdb

    try:
        if suffix == ".bcif":
            structure = mmcif.from_binary(BytesIO(data), name)
        elif suffix in (".cif", ".mmcif"):
            structure = mmcif.from_text(StringIO(data.decode()), name)
        else:
            structure = pdb.from_text(StringIO(data.decode()), name)
    except FoldDataError:
        raise
    except Exception as error:  # of a damaged file anything may come: it is named here
        reason = f"{type(error).__name__}: {error}"
        raise FoldDataError(f"{name}{suffix} is damaged ({reason})") from error
    if not structure.chains:
        raise FoldDataError(f"{name}{suffix} holds no protein chain with atoms")
    return structure


@dataclass(frozen=True, kw_only=True, slots=True)
class AtomRows:
    """Atoms of one chain as a file lists them.

    Attributes:
        residue: (A,) which residue of the sequence each belongs to.
        residue_name: (A,) of three letters.
        atom_name: (A,)
        occupancy: (A,)
        position: (A, 3) in angstrom.
    """

    residue: NDArray[np.int64]
    residue_name: NDArray[np.str_]
    atom_name: NDArray[np.str_]
    occupancy: NDArray[np.float32]
    position: NDArray[np.float32]

    def where(self, keep: NDArray[np.bool_]) -> "AtomRows":
        """Some of the rows."""
        return AtomRows(
            residue=self.residue[keep],
            residue_name=self.residue_name[keep],
            atom_name=self.atom_name[keep],
            occupancy=self.occupancy[keep],
            position=self.position[keep],
        )


def build_chain(name: str, choices: Sequence[Sequence[str]], rows: AtomRows) -> Chain:
    """A chain from its residues' names and the atoms that were seen.

    Of an atom listed more than once the place of highest occupancy counts, the first of equals. So
    it is with residues that have more than one name (microheterogeneity), where AlphaFold's own
    code would count both. Selenium stands where sulphur does. NH1 of arginine is the one that is
    nearer to CD.

    Args:
        name: of the chain.
        choices: for each residue its possible names of three letters.
        rows: the atoms.
    """
    names = [_most_seen(rows, i, c) if len(c) > 1 else c[0] for i, c in enumerate(choices)]
    own = np.asarray(names)[rows.residue] == rows.residue_name
    rows = rows.where(own) if not own.all() else rows
    positions = np.zeros((len(names), len(ATOMS), 3), np.float32)
    mask = np.zeros((len(names), len(ATOMS)), np.float32)
    selenium = (rows.residue_name == "MSE") & (np.char.upper(rows.atom_name) == "SE")
    kinds = np.array(
        [
            _KIND.get(_SELENIUM["SE"] if se else str(atom), -1)
            for atom, se in zip(rows.atom_name, selenium, strict=True)
        ],
        np.int64,
    )
    # Written last is what stays: the highest occupancy, and of equal ones the first.
    order = np.argsort(-rows.occupancy, kind="stable")[::-1]
    order = order[kinds[order] >= 0]
    positions[rows.residue[order], kinds[order]] = rows.position[order]
    mask[rows.residue[order], kinds[order]] = 1
    _rename_arginine(np.asarray(names), positions, mask)
    sequence = "".join(one_letter(each) for each in names)
    return Chain(name=name, sequence=sequence, positions=positions, mask=mask)


def _most_seen(rows: AtomRows, residue: int, names: Sequence[str]) -> str:
    here = rows.where(rows.residue == residue)
    best = {n: here.occupancy[here.residue_name == n].max(initial=-1.0) for n in names}
    return max(names, key=lambda n: float(best[n]))


def _rename_arginine(names: NDArray[Any], positions: NDArray[Any], mask: NDArray[Any]) -> None:
    whole = mask[:, [_CD, _NH1, _NH2]].all(-1) & (names == "ARG")
    far = np.linalg.norm(positions[:, [_NH1, _NH2]] - positions[:, [_CD]], axis=-1)
    wrong = whole & (far[:, 0] > far[:, 1])
    positions[wrong] = _swapped(positions[wrong])


def _swapped(positions: NDArray[Any]) -> NDArray[Any]:
    swapped = positions.copy()
    swapped[:, [_NH1, _NH2]] = positions[:, [_NH2, _NH1]]
    return swapped


def one_letter(residue_name: str) -> str:
    """The letter of a residue, of its parent where it was modified (M of MSE), else X."""
    from biotite.structure.info import one_letter_code

    letter = one_letter_code(residue_name)
    return letter if letter is not None and letter in LETTERS else "X"
