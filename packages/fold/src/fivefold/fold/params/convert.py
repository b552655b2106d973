"""Tensors under one set of names to the same under another, without loss.

What is said of parameters holds of anything shaped like them: the moments of an optimizer, averages
of weights, gradients.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fivefold.fold.errors import FoldParametersError
from fivefold.fold.params.names import Part, Style, Table, parts_of

Arrays = Mapping[str, NDArray[np.float32]]
Tensors = Mapping[str, Tensor]

# Theirs that merge projections: suffix of the merged name to those of what it is made of.
_MERGED = {
    ".mha.linear_qkvg.weight": tuple(f".mha.linear_{x}.weight" for x in "qkvg"),
    ".mha.linear_kv.weight": tuple(f".mha.linear_{x}.weight" for x in "kv"),
    ".mha.linear_g_bias": (".mha.linear_g.bias",),
}


def from_flat(tensors: Tensors, table: Table, style: Style) -> dict[str, Tensor]:
    """Our parameters of those of OpenFold's version 2 or MLPerf's reference.

    Args:
        tensors: by their names, without wrappers; see ``formats.open_parameters``.
        table: of our network.
        style: "openfold" or "mlperf".

    Raises:
        FoldParametersError: names are missing or too many, or shapes do not fit.
    """
    check_names(tensors, [part.name(style) for part in parts_of(table)])
    return {
        ours: torch.cat([_checked(tensors[part.name(style)], part, style) for part in parts])
        for ours, parts in table.items()
    }


def to_flat(tensors: Tensors, table: Table, style: Style) -> dict[str, Tensor]:
    """Parameters of OpenFold's version 2 or MLPerf's reference of ours; the way back."""
    flat = {}
    for ours, parts in table.items():
        pieces = tensors[ours].detach().split([part.num_rows for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            flat[part.name(style)] = piece.clone()
    return flat


def from_alphafold(arrays: Arrays, table: Table) -> dict[str, Tensor]:
    """Our parameters of AlphaFold's arrays.

    Args:
        arrays: of an ``.npz``, with the names of AlphaFold.
        table: of our network.

    Raises:
        FoldParametersError: names are missing or too many, or shapes do not fit.
    """
    check_names(arrays, [part.alphafold for part in parts_of(table)])
    sizes = _num_blocks(table)
    return {
        ours: torch.cat([_from_array(arrays[part.alphafold], part, sizes) for part in parts])
        for ours, parts in table.items()
    }


def to_alphafold(tensors: Tensors, table: Table) -> dict[str, NDArray[np.float32]]:
    """AlphaFold's arrays of our parameters; the way back."""
    pieces: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    stacked = {part.alphafold: part.block is not None for part in parts_of(table)}
    # Blocks of a stack come in their order, because ours do.
    for ours, parts in table.items():
        rows = tensors[ours].detach().cpu().split([part.num_rows for part in parts])
        for part, piece in zip(parts, rows, strict=True):
            array = piece.mT if piece.dim() == 2 else piece
            pieces[part.alphafold].append(array.contiguous().numpy().reshape(part.shape))
    return {
        name: np.stack(blocks) if stacked[name] else blocks[0].copy()
        for name, blocks in pieces.items()
    }


def split_merged(tensors: Tensors) -> dict[str, Tensor]:
    """ScaleFold's merged projections as MLPerf's reference has them; others as they are."""
    split = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _MERGED if name.endswith(suffix)), None)
        if suffix is None:
            split[name] = tensor
            continue
        parts = _MERGED[suffix]
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            split[name.removesuffix(suffix) + part] = rows.clone()
    return split


def merge_projections(tensors: Tensors) -> dict[str, Tensor]:
    """The names of MLPerf's reference as ScaleFold merges them; the way back."""
    merged: dict[str, Tensor] = dict(tensors)
    for suffix, parts in _MERGED.items():
        for name in tensors:
            stem = name.removesuffix(parts[0])
            sources = [stem + part for part in parts]
            is_first = name.endswith(parts[0]) and all(source in merged for source in sources)
            # Keys and values are merged by themselves only where no query goes with them.
            if is_first:
                merged[stem + suffix] = torch.cat([merged.pop(source) for source in sources])
    return merged


def check_names(found: Mapping[str, object], needed: list[str]) -> None:
    """Raise unless the names are those that a network has.

    Raises:
        FoldParametersError: with the first missing and the first unknown ones and their numbers.
    """
    wanted = set(needed)
    missing = [name for name in dict.fromkeys(needed) if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        raise FoldParametersError(
            f"{len(found)} parameters where the network has {len(wanted)}: "
            f"{_listed('missing', missing)}; {_listed('unknown', unknown)}"
        )


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


def _checked(tensor: Tensor, part: Part, style: Style) -> Tensor:
    num_in = int(np.prod(part.shape)) // part.num_rows
    shape = (part.num_rows,) if _is_vector(part) else (part.num_rows, num_in)
    if tuple(tensor.shape) != shape:
        raise FoldParametersError(
            f"{part.name(style)} has shape {tuple(tensor.shape)}, the network's has {shape}"
        )
    return tensor


def _num_blocks(table: Table) -> dict[str, int]:
    """How many blocks each stacked array has."""
    sizes: dict[str, int] = {}
    for part in parts_of(table):
        if part.block is not None:
            sizes[part.alphafold] = max(sizes.get(part.alphafold, 0), part.block + 1)
    return sizes


def _from_array(array: NDArray[np.float32], part: Part, sizes: Mapping[str, int]) -> Tensor:
    lead = () if part.block is None else (sizes[part.alphafold],)
    if array.shape != lead + part.shape:
        raise FoldParametersError(
            f"{part.alphafold} has shape {array.shape}, the network's has {lead + part.shape}"
        )
    block = array if part.block is None else array[part.block]
    if _is_vector(part):
        return torch.from_numpy(np.ascontiguousarray(block).reshape(-1).copy())
    # Theirs maps inputs to outputs; ours has outputs first.
    rows = block.reshape(-1, part.num_rows).T
    return torch.from_numpy(np.ascontiguousarray(rows))


def _is_vector(part: Part) -> bool:
    return int(np.prod(part.shape)) == part.num_rows
