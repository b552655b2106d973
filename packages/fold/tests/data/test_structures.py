"""Chains of real files against AlphaFold's own reading of them, and difficult ones made up."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.fold.data.structures import (
    format_of,
    one_letter,
    parse_structure,
    read_structure,
    sequence_to_aatype,
)
from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import ATOMS

CA, SD = ATOMS.index("CA"), ATOMS.index("SD")
NH1, NH2, CD = (ATOMS.index(name) for name in ("NH1", "NH2", "CD"))


@pytest.mark.parametrize("name", ["1ubq", "1kd8", "2q2k", "1psm", "1a8o", "4cup"])
def test_chains_equal_alphafold(name: str, real: Path, data_goldens: Any, digest: Any) -> None:
    golden = data_goldens["structures"][name]
    structure = read_structure(real / f"structures/{name}.cif.gz")
    assert structure.name == name
    assert structure.resolution == golden["header"]["resolution"]
    assert structure.method == golden["header"]["structure_method"]
    assert structure.release_date == golden["header"].get("release_date", "")
    assert sorted(structure.chains) == sorted(golden["chains"])
    for chain in structure.chains.values():
        expected = golden["chains"][chain.name]
        assert chain.sequence == expected["sequence"]
        assert digest(chain.aatype) == expected["aatype"]
        assert chain.mask.sum(-1).astype(int).tolist() == expected["atoms"]
        assert digest(chain.mask) == expected["mask"]
        assert digest(chain.positions) == expected["positions"]


def test_selenomethionine_is_methionine(real: Path) -> None:
    chain = read_structure(real / "structures/1a8o.cif.gz").chain("A")
    found = [i for i, letter in enumerate(chain.sequence) if letter == "M"]
    assert found == [0, 34, 63, 64]
    assert chain.mask[found, SD].all()


def test_of_several_models_the_first_counts(real: Path, unpacked: Any) -> None:
    text = unpacked("structures/1psm.cif.gz")
    lines = [x for x in text.splitlines(keepends=True) if x.startswith("ATOM")]
    rows = [line.split() for line in lines]
    first = next(row for row in rows if row[3] == "CA")
    chain = read_structure(real / "structures/1psm.cif.gz").chain("A")
    np.testing.assert_allclose(chain.positions[0, CA], [float(x) for x in first[10:13]])
    assert {row[-1] for row in rows} == {"1", "2"}


def row(
    serial: int,
    atom: str,
    residue: str,
    number: int,
    at: float,
    *,
    alternative: str = " ",
    occupancy: float = 1.0,
    insertion: str = " ",
    record: str = "ATOM",
) -> str:
    """A row of a PDB file, at x = ``at``."""
    return (
        f"{record:6}{serial:5} {atom:^4}{alternative}{residue:>3} A{number:4}{insertion}   "
        f"{at:8.3f}{0:8.3f}{0:8.3f}{occupancy:6.2f}{0:6.2f}          {atom[0]:>2}  \n"
    )


def pdb(*rows: str, seqres: str = "") -> Any:
    names = seqres.split()
    head = f"SEQRES   1 A {len(names):4}  {' '.join(names)}\n" if names else ""
    return parse_structure((head + "".join(rows) + "END\n").encode(), ".pdb", "made").chain("A")


def test_of_alternatives_the_highest_occupancy_counts_and_of_equals_the_first() -> None:
    chain = pdb(
        row(1, "CA", "ALA", 1, 1, alternative="A", occupancy=0.3),
        row(2, "CA", "ALA", 1, 2, alternative="B", occupancy=0.7),
        row(3, "CB", "ALA", 1, 3, alternative="A", occupancy=0.5),
        row(4, "CB", "ALA", 1, 4, alternative="B", occupancy=0.5),
    )
    assert chain.positions[0, CA, 0] == 2
    assert chain.positions[0, ATOMS.index("CB"), 0] == 3
    assert chain.mask.sum() == 2


def test_a_residue_with_two_names_is_one_residue() -> None:
    chain = pdb(
        row(1, "CA", "SER", 1, 1, alternative="A", occupancy=0.4),
        row(2, "OG", "SER", 1, 2, alternative="A", occupancy=0.4),
        row(3, "CA", "THR", 1, 3, alternative="B", occupancy=0.6),
        row(4, "OG1", "THR", 1, 4, alternative="B", occupancy=0.6),
        row(5, "CA", "GLY", 2, 5),
    )
    assert chain.sequence == "TG"
    assert chain.positions[0, CA, 0] == 3
    assert not chain.mask[0, ATOMS.index("OG")]


def test_insertion_codes_are_residues_of_their_own() -> None:
    chain = pdb(
        row(1, "CA", "ALA", 5, 1),
        row(2, "CA", "GLY", 5, 2, insertion="A"),
        row(3, "CA", "TRP", 5, 3, insertion="B"),
        row(4, "CA", "SER", 6, 4),
    )
    assert chain.sequence == "AGWS"
    assert chain.positions[:, CA, 0].tolist() == [1, 2, 3, 4]


def test_residues_are_found_in_the_sequence_of_the_experiment() -> None:
    chain = pdb(
        row(1, "CA", "GLY", 10, 1),
        row(2, "CA", "TRP", 13, 2),
        row(3, "CA", "LYS", 14, 3),
        row(4, "O", "HOH", 99, 9, record="HETATM"),
        seqres="MET ALA GLY SER SER TRP LYS LYS",
    )
    assert chain.sequence == "MAGSSWKK"
    assert np.flatnonzero(chain.mask[:, CA]).tolist() in ([2, 5, 6], [2, 5, 7])
    assert chain.mask.sum() == 3


def test_atoms_that_the_sequence_denies_are_named() -> None:
    with pytest.raises(FoldDataError, match=r"chain A has atoms of TRP, its residue 2 of 3"):
        pdb(
            row(1, "CA", "GLY", 1, 1),
            row(2, "CA", "TRP", 2, 2),
            row(3, "CA", "LYS", 3, 3),
            seqres="GLY LYS",
        )


def test_unknown_and_modified_residues() -> None:
    chain = pdb(
        row(1, "CA", "UNK", 1, 1),
        row(2, "CA", "MSE", 2, 2, record="HETATM"),
        row(3, "SE", "MSE", 2, 3, record="HETATM"),
        row(4, "CA", "SEP", 3, 4, record="HETATM"),
        row(5, "P", "SEP", 3, 5, record="HETATM"),
    )
    assert chain.sequence == "XMS"
    assert chain.aatype.tolist() == [20, 12, 15]
    assert chain.positions[1, SD, 0] == 3
    assert chain.mask.sum() == 4  # phosphorus is none of the 37
    assert one_letter("no such") == "X"


def test_the_nearer_nitrogen_of_arginine_is_the_first() -> None:
    rows = [row(i, a, "ARG", 1, x) for i, (a, x) in enumerate(
        {"CA": 0, "CD": 5, "NH1": 9, "NH2": 7}.items())]  # fmt: skip
    chain = pdb(*rows)
    assert chain.positions[0, [NH1, NH2], 0].tolist() == [7, 9]
    kept = pdb(*(line.replace("ARG", "LYS") for line in rows))
    assert kept.positions[0, [NH1, NH2], 0].tolist() == [9, 7]


def test_pdb_and_mmcif_of_one_entry_agree(real: Path, tmp_path: Path) -> None:
    """1UBQ written as PDB by biotite, which knows no SEQRES, and with it put in front."""
    from biotite.structure.io import pdb as pdb_files
    from biotite.structure.io import pdbx

    path = tmp_path / "1ubq.cif"
    path.write_bytes(gzip.decompress((real / "structures/1ubq.cif.gz").read_bytes()))
    atoms = pdbx.get_structure(pdbx.CIFFile.read(path), model=1)
    file = pdb_files.PDBFile()
    file.set_structure(atoms)
    file.write(tmp_path / "1ubq.pdb")
    expected = read_structure(path).chain("A")
    found = read_structure(tmp_path / "1ubq.pdb").chain("A")
    assert found.sequence == expected.sequence
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.positions, expected.positions, atol=1e-3)
    binary = pdbx.BinaryCIFFile()
    pdbx.set_structure(binary, atoms)
    binary.write(tmp_path / "1ubq.bcif")
    again = read_structure(tmp_path / "1ubq.bcif").chain("A")
    assert again.sequence == expected.sequence
    np.testing.assert_array_equal(again.positions, expected.positions)


def test_what_cannot_be_read_is_named(real: Path, tmp_path: Path, unpacked: Any) -> None:
    text = unpacked("structures/1ubq.cif.gz")
    broken = tmp_path / "broken.cif"
    broken.write_text(text[: len(text) // 3])
    with pytest.raises(FoldDataError, match=r"broken\.cif"):
        read_structure(broken)
    (tmp_path / "text.cif").write_text("no mmCIF at all")
    with pytest.raises(FoldDataError, match=r"text\.cif is damaged"):
        read_structure(tmp_path / "text.cif")
    (tmp_path / "cut.cif.gz").write_bytes((real / "structures/1ubq.cif.gz").read_bytes()[:1000])
    with pytest.raises(FoldDataError, match=r"cut\.cif\.gz cannot be read"):
        read_structure(tmp_path / "cut.cif.gz")
    with pytest.raises(FoldDataError, match="cannot be read"):
        read_structure(tmp_path / "absent.pdb")
    with pytest.raises(FoldDataError, match=r"is none of \.cif"):
        format_of(Path("model.xyz"))
    water = row(1, "O", "HOH", 1, 1, record="HETATM").encode()
    with pytest.raises(FoldDataError, match="holds no protein chain"):
        parse_structure(water, ".pdb", "water")


def test_a_chain_that_is_not_there(real: Path) -> None:
    with pytest.raises(FoldDataError, match="no protein chain 'Z'; it has A, B"):
        read_structure(real / "structures/2q2k.cif.gz").chain("Z")


def test_letters_to_numbers() -> None:
    assert sequence_to_aatype("ARVXBé-").tolist() == [0, 1, 19, 20, 20, 20, 20]
