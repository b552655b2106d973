"""Headers of safetensors files, against the safetensors library, and damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub.header import DTYPES, plan_header, read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(True),
    "d": torch.empty(0, 4),
    "e": torch.arange(3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_entries_agree_with_the_library(file: Path) -> None:
    entries = read_header(file)
    assert set(entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].dtype == tensor.dtype
        assert entries[name].stop - entries[name].start == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_planned_files_are_files_of_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    header, entries = plan_header(
        {"odd": ((3,), torch.uint8), "x": ((2, 5), dtype), "half": ((1,), torch.float16)},
        {"k": "v"},
    )
    size = max(entry.stop for entry in entries.values())
    assert size == 3 + 10 * dtype.itemsize + 2
    assert len(header) % 8 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())
    path = tmp_path / "y.safetensors"
    path.write_bytes(header + bytes(size))
    assert read_header(path) == entries
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"k": "v"}
        assert opened.get_tensor("x").dtype == dtype
        assert opened.get_tensor("x").shape == (2, 5)


def test_dtypes_without_a_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"x: safetensors cannot hold torch\.complex128"):
        plan_header({"x": ((1,), torch.complex128)}, {})


def test_every_truncation_is_found(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(cut)


def test_truncation_names_both_sizes(file: Path) -> None:
    whole = file.read_bytes()
    tensors = sum(tensor.nbytes for tensor in TENSORS.values())
    file.write_bytes(whole[:-5])
    message = f"promises {tensors} bytes of tensors, the file has {tensors - 5}$"
    with pytest.raises(CheckpointError, match=message):
        read_header(file)
    file.write_bytes(whole + b"123")
    with pytest.raises(CheckpointError, match=f"the file has {tensors + 3}$"):
        read_header(file)


def write(path: Path, table: Any, data: bytes = b"") -> None:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"{not json", "damaged safetensors header"),
        (b"\xff\xfe", "damaged safetensors header"),
        ([1, 2], "damaged safetensors header"),
        ({"a": 3}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "damaged safetensors header: .*data_offsets"),
        ({"a": entry("F99", [2], 0, 8)}, "dtype 'F99' is none of F64"),
        (
            {"a": entry("F32", [2], 0, 4)},
            r"'a' of shape \(2,\) and torch.float32 needs bytes 0 to 8",
        ),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "'b' .* needs bytes 4 to 8"),
        ({"a": entry("F32", [1], 4, 8)}, "needs bytes 0 to 4, the header says 4 to 8"),
    ],
)
def test_damaged_headers(tmp_path: Path, table: Any, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    write(path, table, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_other_files_are_not_taken_for_huge_headers(tmp_path: Path) -> None:
    path = tmp_path / "pickle.safetensors"
    path.write_bytes(b"PK\x03\x04 some zip archive, not tensors")
    with pytest.raises(
        CheckpointError, match=r"not a whole safetensors file.* has 34 bytes in all"
    ):
        read_header(path)
