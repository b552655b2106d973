"""Tables of kernels, in files and on the screen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fivefold.kernels import KernelInputError
from fivefold.kernels.offline import records
from fivefold.kernels.offline.records import Record

RECORD = Record(
    package="kernels",
    op="rotary",
    kernel="_kernel",
    target="sm_90a",
    sample="1x4096",
    dtype="bfloat16",
    variant=0,
    num_warps=4,
    num_stages=2,
    registers=62,
    spill_bytes=0,
    shared_bytes=16,
    tensor_core={"HGMMA": 4},
    load_bytes=16,
    store_bytes=0,
    narrow_loads=0.1,
    narrow_stores=0.0,
    lost_load_bytes=8,
    lost_store_bytes=0,
    moved_bytes=2**26,
    has_dot=False,
    needs_tensor_cores=False,
    needs_wide=True,
    compiler="triton 3.9.0",
)
MANY = [replace(RECORD, variant=1), replace(RECORD, package="moe"), RECORD]


def test_files_have_one_order_and_come_back(tmp_path: Path) -> None:
    there, again = tmp_path / "a.json", tmp_path / "b.json"
    records.write(there, MANY)
    records.write(again, reversed(MANY))
    assert there.read_text() == again.read_text()
    assert records.read(there) == sorted(MANY, key=lambda record: record.key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_the_promised_keys(tmp_path: Path) -> None:
    records.write(tmp_path / "a.json", [RECORD])
    promised = (
        "package op kernel target registers spill_bytes shared_bytes tensor_core load_bytes "
        "store_bytes"
    )
    assert set(promised.split()) < json.loads((tmp_path / "a.json").read_text())[0].keys()


def test_no_records(tmp_path: Path) -> None:
    records.write(tmp_path / "a.json", [])
    assert records.read(tmp_path / "a.json") == []


@pytest.mark.parametrize("text", ["", "{}}", '[{"package": "kernels"}]', "[3]", "3"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(KernelInputError, match=r"a\.json is no table of kernels"):
        records.read(tmp_path / "a.json")


def test_the_table() -> None:
    head, first, second, third = records.table(MANY).splitlines()
    assert head.split()[:3] == ["op", "kernel", "sample"]
    cells = "kernels/rotary _kernel 1x4096 bfloat16 sm_90a 4 62 0 16 HGMMA×4 16 (8 lost) -"
    assert " ".join(first.split()) == cells
    assert second.split()[1:3] == ["_kernel", "#2"]
    assert third.startswith("moe/rotary")


def test_long_names_of_samples_are_cut_in_the_table_alone(tmp_path: Path) -> None:
    long = replace(RECORD, sample="x" * 100)
    assert "x" * 35 + "… " in records.table([long])
    records.write(tmp_path / "a.json", [long])
    assert records.read(tmp_path / "a.json") == [long]
