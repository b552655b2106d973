"""The command, as a user calls it."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.fold.cli import main
from fivefold.fold.data.dataset import Chains

REAL = Path(__file__).parent / "real" / "structures"


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom fivefold.fold.cli import _parser\n_parser().format_help()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_prepare_keeps_what_is_whole_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mmcif"
    folder.mkdir()
    (source,) = REAL.glob("1ubq*")
    data = source.read_bytes()
    (folder / "1ubq.cif").write_bytes(gzip.decompress(data) if source.suffix == ".gz" else data)
    (folder / "9bad.cif").write_text("data_9BAD\nloop_\n_atom_site.id\n")
    words = ["prepare", "--structures", str(folder), "--out", str(tmp_path / "prepared")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "left out 9bad" in told and "1 chains kept, 1 left out" in told
    (record,) = Chains(tmp_path / "prepared").records
    assert len(record["sequence"]) == 76


def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--structures", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("fivefold-fold: error: ") and told.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(["prepare"])
    assert stopped.value.code == 2
