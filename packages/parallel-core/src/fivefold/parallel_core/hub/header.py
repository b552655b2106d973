"""The header of a safetensors file: names, types, shapes and byte ranges, and nothing else.

A file is 8 bytes (little endian length of the header), the header as JSON, and the tensors' bytes.
Read here, and not by the safetensors library, so that a damaged file is named with its sizes, and
so that a file can be written tensor by tensor, which the library does not offer.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fivefold.parallel_core.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Type names of the file format to torch's; those that every release we support can read."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Args:
        dtype: torch's type.
        shape: extent in every dim.
        start: first byte, counted from the end of the header.
        stop: one past the last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file, after checking that the file is as long as its header says.

    Raises:
        CheckpointError: the file is truncated, too long, or no safetensors file; the message has
            the expected and the found sizes in bytes.
    """
    size = os.stat(path).st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER):
            raise CheckpointError(
                f"{path}: not a whole safetensors file: its first bytes promise a header of "
                f"{length} bytes, the file has {size} bytes in all"
            )
        text = file.read(length)
    try:
        table = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        entries = {name: _entry(fields) for name, fields in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {error!r}") from None
    _check_ranges(path, entries, size - _LENGTH_BYTES - length)
    return entries


def _entry(fields: Mapping[str, Any]) -> Entry:
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"dtype {fields['dtype']!r} is none of {', '.join(DTYPES)}")
    start, stop = map(int, fields["data_offsets"])
    return Entry(DTYPES[fields["dtype"]], tuple(map(int, fields["shape"])), start, stop)


def _check_ranges(path: Path, entries: Mapping[str, Entry], found: int) -> None:
    """Tensors must fill ``found`` bytes one after another, without holes."""
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        size = prod(entry.shape) * entry.dtype.itemsize
        if entry.start != expected or entry.stop - entry.start != size:
            raise CheckpointError(
                f"{path}: damaged safetensors header: {name!r} of shape {entry.shape} and "
                f"{entry.dtype} needs bytes {expected} to {expected + size}, the header says "
                f"{entry.start} to {entry.stop}"
            )
        expected = entry.stop
    if expected != found:
        raise CheckpointError(
            f"{path}: truncated or damaged: the header promises {expected} bytes of tensors, "
            f"the file has {found}"
        )


def plan_header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Lay out one file.

    Args:
        tensors: names to (shape, dtype).
        metadata: free text for the header.

    Returns:
        The file's first bytes (length and header), and where each tensor goes behind them.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    # Widest types first keep every tensor aligned to its own type, as the library's files are.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    entries: dict[str, Entry] = {}
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        shape, dtype = tensors[name]
        if dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors cannot hold {dtype}, only {_listed()}")
        entries[name] = Entry(dtype, shape, start, start + prod(shape) * dtype.itemsize)
        start = entries[name].stop
        offsets = [entries[name].start, start]
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries


def _listed() -> str:
    return ", ".join(str(dtype) for dtype in _NAMES)
