"""Writing a folder of safetensors, tensor by tensor, so that a killed save never looks whole."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fivefold.parallel_core.errors import CheckpointError, ConfigError
from fivefold.parallel_core.files import sync_folder, synced_file, temporary_name, write_json
from fivefold.parallel_core.hub.header import plan_header
from fivefold.parallel_core.hub.reader import INDEX, SINGLE

Spec = tuple[str, Sequence[int], torch.dtype]
"""Name, shape and dtype of a tensor that is going to be written."""

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def write_sharded(
    folder: str | Path,
    plan: Iterable[Spec],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors as one ``model.safetensors``, or as shards and an index, for any reader.

    ``tensors`` is consumed one at a time and each is written before the next is asked for, so it
    may be a generator that gathers them from other ranks. Everything is written under temporary
    names first. An older save in the folder stays as it was until the new one is complete on
    disk; its files are removed last. A kill at any moment leaves the old save, or the new one,
    or (within the few renames between two saves with equal file names) a folder without an index.

    Args:
        folder: made if missing.
        plan: what will come, in this order; it decides how many files there are.
        tensors: (name, tensor) pairs that match the plan; any device, any strides.
        max_shard_size: bytes, or text such as ``"5GB"`` (1000s) or ``"512MiB"`` (1024s). A larger
            tensor has a file for itself.
        metadata: text for the files' headers; transformers asks for ``{"format": "pt"}``, which
            is the default.

    Returns:
        The files that hold the tensors.

    Raises:
        CheckpointError: the plan is empty or has a name twice, or the tensors do not follow it.
        ConfigError: ``max_shard_size`` is no size.
    """
    folder = Path(folder)
    shards = split(checked(plan), num_bytes(max_shard_size))
    names = file_names(len(shards))
    folder.mkdir(parents=True, exist_ok=True)
    remove(folder.glob(".model*.partial-*"))  # of a save that was killed
    partial = {name: folder / temporary_name(name) for name in names}
    arriving = iter(tensors)
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(partial[name], shard, arriving, metadata or {"format": "pt"})
        extra = next(arriving, None)
        if extra is not None:
            raise CheckpointError(f"tensor {extra[0]!r} comes after the last one of the plan")
        publish(folder, partial, index_of(names, shards))
    finally:
        remove(partial.values())
    return [folder / name for name in names]


def checked(plan: Iterable[Spec]) -> list[Spec]:
    """The plan as a list; raises ``CheckpointError`` where it is empty or has a name twice."""
    specs = [(name, tuple(shape), dtype) for name, shape, dtype in plan]
    names = [name for name, _, _ in specs]
    if not names:
        raise CheckpointError("nothing to write: the plan names no tensor")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"the plan has {twice!r} more than once")
    return list(specs)


def num_bytes(size: int | str) -> int:
    """A size as a number; raises ``ConfigError`` where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(f"max_shard_size {size!r}: expected bytes, or a number with {units}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _nbytes(spec: Spec) -> int:
    return prod(spec[1]) * spec[2].itemsize


def split(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Cut the plan, in order, into runs of at most ``limit`` bytes or of one tensor."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + _nbytes(spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += _nbytes(spec)
    return shards


def file_names(count: int) -> list[str]:
    """What the files of a folder are called, as transformers calls them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_of(names: Sequence[str], shards: Sequence[Sequence[Spec]]) -> dict[str, object]:
    """The index of a folder of shards."""
    pairs = [(spec, name) for name, shard in zip(names, shards, strict=True) for spec in shard]
    return {
        "metadata": {"total_size": sum(_nbytes(spec) for spec, _ in pairs)},
        "weight_map": {spec[0]: name for spec, name in pairs},
    }


def _write_shard(
    path: Path,
    shard: Sequence[Spec],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write one file; each tensor goes to its own offset, in the order of arrival."""
    header, entries = plan_header({name: (tuple(s), d) for name, s, d in shard}, metadata)
    with synced_file(path) as file:
        file.write(header)
        for spec in shard:
            file.seek(len(header) + entries[spec[0]].start)
            file.write(raw(_next(spec, tensors)))  # no name keeps it alive while the next is made


def _next(spec: Spec, tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
    name, shape, dtype = spec
    planned = f"the plan has {name!r} of shape {tuple(shape)} and {dtype}"
    pair = next(tensors, None)
    if pair is None:
        raise CheckpointError(f"{planned}, the tensors ended before it")
    found, tensor = pair
    if (found, tuple(tensor.shape), tensor.dtype) != (name, tuple(shape), dtype):
        raise CheckpointError(
            f"{planned}, found {found!r} of shape {tuple(tensor.shape)} and {tensor.dtype}"
        )
    return tensor


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of the file format."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def publish(folder: Path, partial: Mapping[str, Path], index: Mapping[str, object]) -> None:
    """Give complete files their names, in an order that never shows a mixture of two saves.

    Readers take ``model.safetensors`` before an index, so that file goes first when it is new and
    goes last when it is old.
    """
    sharded = SINGLE not in partial
    if sharded and any((folder / name).exists() for name in partial):
        remove([folder / INDEX])  # it would call a mixture of old and new shards complete
        sync_folder(folder)
    for name, path in partial.items():
        path.replace(folder / name)
    sync_folder(folder)
    if sharded:
        write_json(folder / INDEX, index)
    stale = [SINGLE] if sharded else [INDEX]
    shards = [path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
    remove(folder / name for name in stale + shards if name not in partial)


def remove(paths: Iterable[Path]) -> None:
    """Remove files that may be there."""
    for path in paths:
        path.unlink(missing_ok=True)
