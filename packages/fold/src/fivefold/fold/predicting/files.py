"""Predictions as files: PDB, mmCIF, a report in JSON, and a picture of the confidence."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.fold.errors import FoldDataError
from fivefold.fold.geometry.residues import ATOMS, residues
from fivefold.fold.predicting.predict import Prediction
from fivefold.parallel_core.files import atomic_file, atomic_write_text

_MOST_ATOMS, _MOST_RESIDUES = 99_999, 9_999
"""That the columns of a PDB file can number."""


def _three_letters(sequence: str) -> list[str]:
    names = {residue.letter: residue.name for residue in residues()}
    return [names.get(letter, "UNK") for letter in sequence]


def atoms_of(prediction: Prediction) -> Any:
    """The atoms as biotite has them; lDDT from 0 to 100 as B factors, chain A, from 1.

    Raises:
        FoldDataError: positions that are not finite.
    """
    from biotite.structure import AtomArray

    residue, kind = np.nonzero(prediction.atom_mask.numpy() > 0)
    coordinates = prediction.positions.numpy()[residue, kind]
    if not np.isfinite(coordinates).all():
        raise FoldDataError(f"{prediction.name}: positions are not finite; no file is written")
    atoms = AtomArray(len(residue))
    names = np.array(_three_letters(prediction.sequence))
    atoms.coord = coordinates
    atoms.chain_id[:] = "A"
    atoms.res_id = residue + 1
    atoms.res_name = names[residue]
    atoms.atom_name = np.array(ATOMS)[kind]
    atoms.element = np.array([name[0] for name in ATOMS])[kind]
    atoms.set_annotation("b_factor", prediction.plddt.numpy()[residue].round(2))
    atoms.set_annotation("occupancy", np.ones(len(residue)))
    return atoms


def write_pdb(prediction: Prediction, path: str | Path) -> None:
    """Write a PDB file.

    Raises:
        FoldDataError: more atoms or residues than its columns can number.
    """
    from biotite.structure.io.pdb import PDBFile

    atoms = atoms_of(prediction)
    if len(atoms) > _MOST_ATOMS or len(prediction.sequence) > _MOST_RESIDUES:
        raise FoldDataError(
            f"{prediction.name} has {len(prediction.sequence)} residues and {len(atoms)} atoms, "
            f"a PDB file at most {_MOST_RESIDUES} and {_MOST_ATOMS}; mmCIF has no such limit"
        )
    file = PDBFile()
    file.set_structure(atoms)
    _write(file, path)


def write_mmcif(prediction: Prediction, path: str | Path) -> None:
    """Write a PDBx/mmCIF file, with the whole sequence."""
    from biotite.structure.io import pdbx

    file = pdbx.CIFFile()
    pdbx.set_structure(file, atoms_of(prediction), data_block=prediction.name or "prediction")
    names = np.array(_three_letters(prediction.sequence))
    numbers = np.arange(1, len(names) + 1)
    block = file.block
    block["entity"] = pdbx.CIFCategory({"id": ["1"], "type": ["polymer"]})
    block["struct_asym"] = pdbx.CIFCategory({"id": ["A"], "entity_id": ["1"]})
    block["entity_poly_seq"] = pdbx.CIFCategory(
        {"entity_id": np.full(len(names), "1"), "num": numbers, "mon_id": names}
    )
    kinds = sorted(set(names.tolist()))
    links = ["PEPTIDE LINKING" if name == "GLY" else "L-PEPTIDE LINKING" for name in kinds]
    block["chem_comp"] = pdbx.CIFCategory({"id": kinds, "type": links})
    _write(file, path)


def _write(file: Any, path: str | Path) -> None:
    text = io.StringIO()
    file.write(text)
    atomic_write_text(path, text.getvalue())


def report_of(prediction: Prediction) -> dict[str, Any]:
    """What is known of how sure a prediction is, as plain data."""
    found: dict[str, Any] = {
        "name": prediction.name,
        "sequence": prediction.sequence,
        "mean_plddt": round(prediction.mean_plddt, 3),
        "plddt": [round(x, 2) for x in prediction.plddt.tolist()],
    }
    if prediction.aligned_error is not None:
        found["ptm"] = prediction.ptm
        found["max_predicted_aligned_error"] = prediction.max_aligned_error
        found["predicted_aligned_error"] = [
            [round(x, 2) for x in row] for row in prediction.aligned_error.tolist()
        ]
    return found


def write_report(found: dict[str, Any], path: str | Path) -> None:
    """Write a report; what is not finite becomes null."""
    finite = json.loads(json.dumps(found), parse_constant=lambda _: None)
    atomic_write_text(path, json.dumps(finite, allow_nan=False) + "\n")


def plot(prediction: Prediction, path: str | Path) -> None:
    """Draw lDDT along the chain and, where it is predicted, the aligned error.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError('plots need matplotlib: pip install "fivefold-fold[plot]"') from missing
    error = prediction.aligned_error
    figure = Figure(figsize=(6 if error is None else 11, 4), layout="constrained")
    panels = figure.subplots(1, 1 if error is None else 2, squeeze=False)[0]
    places = range(1, len(prediction.sequence) + 1)
    panels[0].plot(places, prediction.plddt.tolist(), color="#4477aa")
    panels[0].set(xlabel="residue", ylabel="predicted lDDT", ylim=(0, 100))
    panels[0].set_title(f"{prediction.name}: mean {prediction.mean_plddt:.1f}", loc="left")
    panels[0].grid(alpha=0.25)
    if error is not None:
        extent = (0.5, len(places) + 0.5, len(places) + 0.5, 0.5)
        image = panels[1].imshow(
            error.numpy(), cmap="Greens_r", vmin=0, vmax=prediction.max_aligned_error, extent=extent
        )
        panels[1].set(xlabel="scored residue", ylabel="aligned residue")
        panels[1].set_title(f"pTM {prediction.ptm:.2f}", loc="left")
        figure.colorbar(image, ax=panels[1], label="expected error, angstrom")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
