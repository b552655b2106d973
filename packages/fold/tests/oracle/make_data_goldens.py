"""What AlphaFold's own data code says of real files: made anew by ``python make_data_goldens.py``.

Runs in the environment of ``make_goldens.py`` (``alphafold-colabfold==2.3.7`` with biopython below
1.86; nothing else of it is imported). The files come out of two PyPI packages that ship them, which
pip downloads into a temporary folder: the wheel of openfold3 0.5.0 and the sources of biopython
1.88. Small ones are kept, packed, under ``tests/real``; what AlphaFold makes of them goes to
``data_goldens.json`` as digests, sums and sequences.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from alphafold.common import residue_constants
from alphafold.data import mmcif_parsing, parsers, pipeline, templates
from Bio.Data import PDBData

HERE = Path(__file__).parent
REAL = HERE.parent / "real"
STRUCTURES = ("1ubq", "1kd8", "2q2k", "1psm", "1a8o", "4cup")
ALIGNMENTS = ("uniref90_hits.sto", "bfd_uniclust_hits.a3m", "mgnify_hits.sto", "uniprot_hits.sto")
HITS = ("4p79_hhsearch_server_NOssm.hhr", "hhpred_9590198.hhr")
NUM_MODELS = 2


def main() -> None:
    """Fetch, keep the small files, write the goldens."""
    with tempfile.TemporaryDirectory() as folder:
        keep_files(*fetch(Path(folder)))
    # The first releases of AlphaFold had letters for modified residues, from a table that left
    # biopython since; this is the same one under its new name.
    letters = {k.strip(): v for k, v in PDBData.protein_letters_3to1_extended.items()}
    mmcif_parsing.PDBData.protein_letters_3to1 = letters
    goldens = {
        "structures": {name: structure(name) for name in STRUCTURES},
        "alignments": alignments(),
        "hits": {name: hits(name) for name in HITS},
    }
    (HERE / "data_goldens.json").write_text(json.dumps(goldens, indent=1) + "\n")


def fetch(folder: Path) -> tuple[Path, Path]:
    """Where the data files of both packages lie, unpacked."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    subprocess.run([*pip, "openfold3==0.5.0"], check=True)
    subprocess.run([*pip, "--no-binary", ":all:", "biopython==1.88"], check=True)
    with zipfile.ZipFile(next(folder.glob("openfold3*.whl"))) as wheel:
        wheel.extractall(folder)
    with tarfile.open(next(folder.glob("biopython*.tar.gz"))) as sources:
        sources.extractall(folder, filter="data")
    return folder / "openfold3/tests/test_data", folder / "biopython-1.88/Tests"


def keep_files(openfold: Path, biopython: Path) -> None:
    """Pack what the tests read; of several models two are enough."""
    for name in STRUCTURES:
        path = openfold / f"mmcifs/{name}.cif"
        path = path if path.exists() else biopython / f"PDB/{name.upper()}.cif"
        keep(f"structures/{name}.cif.gz", "".join(models(path.read_text())))
    for name in ALIGNMENTS:
        keep(f"alignments/2q2k_A/{name}.gz", (openfold / "alignments/2q2k_A" / name).read_text())
    for name in HITS:
        keep(f"hits/{name}.gz", (biopython / "HHsuite" / name).read_text())


def models(text: str) -> list[str]:
    """Lines of an mmCIF file without atoms of further models."""
    lines = text.splitlines(keepends=True)
    columns = [line.strip() for line in lines if line.startswith("_atom_site.")]
    model = columns.index("_atom_site.pdbx_PDB_model_num")
    kept = []
    for line in lines:
        of_atom = line.startswith(("ATOM ", "HETATM "))
        if not of_atom or int(line.split()[model]) <= NUM_MODELS:
            kept.append(line)
    return kept


def keep(name: str, text: str) -> None:
    """Write a packed file whose bytes depend on the text alone."""
    path = REAL / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read(name: str) -> str:
    """A packed file."""
    return gzip.decompress((REAL / name).read_bytes()).decode()


def structure(name: str) -> dict[str, Any]:
    """Header and chains of a file as AlphaFold reads it for templates."""
    parsed = mmcif_parsing.parse(
        file_id=name, mmcif_string=read(f"structures/{name}.cif.gz"), catch_all_errors=False
    ).mmcif_object
    chains = {}
    for chain, sequence in parsed.chain_to_seqres.items():
        positions, mask = templates._get_atom_positions(parsed, chain, 150.0)
        chains[chain] = {
            "sequence": sequence,
            "aatype": digest(one_hot(sequence).argmax(-1)),
            "positions": digest(positions.astype(np.float32)),
            "mask": digest(mask.astype(np.float32)),
            "atoms": [int(x) for x in mask.sum(-1)],
        }
    return {"header": parsed.header, "chains": chains}


def one_hot(sequence: str) -> np.ndarray:
    """Numbers of amino acids as AlphaFold gives them to its network."""
    return pipeline.make_sequence_features(sequence, "", len(sequence))["aatype"]


def alignments() -> dict[str, Any]:
    """Features of each alignment of 2Q2K and of the first three together; of 1UBQ alone too."""
    parse = {"sto": parsers.parse_stockholm, "a3m": parsers.parse_a3m}
    parsed = {
        name: parse[name.split(".")[-1]](read(f"alignments/2q2k_A/{name}.gz"))
        for name in ALIGNMENTS
    }
    ubiquitin = structure("1ubq")["chains"]["A"]["sequence"]
    return {
        **{name: msa_features([msa]) for name, msa in parsed.items()},
        "joined": msa_features(list(parsed.values())[:3]),
        "1ubq": msa_features([parsers.parse_a3m(f">1ubq\n{ubiquitin}\n")]),
    }


def msa_features(msas: list[parsers.Msa]) -> dict[str, Any]:
    """Features with and without repeated rows; the releases of AlphaFold leave these out."""
    features = pipeline.make_msa_features(msas)
    order = np.array(residue_constants.MAP_HHBLITS_AATYPE_TO_OUR_AATYPE)
    classes = order[features["msa"]]
    deletions = features["deletion_matrix_int"]
    first = sorted({row.tobytes(): i for i, row in reversed(list(enumerate(classes)))}.values())
    return {
        "shape": list(classes.shape),
        "classes": digest(classes.astype(np.int8)),
        "deletions": digest(deletions.astype(np.int32)),
        "num_deletions": int(deletions.sum()),
        "first_of_equals": first,
    }


def hits(name: str) -> list[Any]:
    """Every field of every hit."""
    found = parsers.parse_hhr(read(f"hits/{name}.gz"))
    return [
        [h.index, h.aligned_cols, h.sum_probs, digest_text(repr(
            (h.name, h.query, h.hit_sequence, h.indices_query, h.indices_hit)))]
        for h in found
    ]  # fmt: skip


def digest(array: np.ndarray) -> str:
    """Of values and shape; -0 counts as 0."""
    return digest_text(str(array.shape) + (array + 0).tobytes().hex())


def digest_text(text: str) -> str:
    """Short, for these are not secrets."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


if __name__ == "__main__":
    main()
