"""Sparse layers as files: safetensors in which a sparse matrix is four tensors.

There is no type for sparse tensors in safetensors. The fields are named as older bitmask files of
compressed-tensors have them; for a matrix ``weight_hh_l0`` (R, H) with N nonzeros they are

- ``weight_hh_l0.compressed`` (N,): the nonzeros, row by row;
- ``weight_hh_l0.bitmask`` (R, ceil(H / 8)) uint8: bit ``h % 8`` of byte ``h // 8`` is column h;
- ``weight_hh_l0.row_offsets`` (R,) int64: where each row begins in ``compressed``;
- ``weight_hh_l0.shape`` (2,) int64: R, H.

``config.json`` has the arguments of the layer. What a device needs (order, padding) is not in the
file: it is made anew when it is needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fivefold.parallel_core import hub
from fivefold.parallel_core.errors import CheckpointError
from fivefold.sparse_rnn import pattern
from fivefold.sparse_rnn.card import layer_card
from fivefold.sparse_rnn.errors import SparseRNNFileError

CONFIG, CARD = "config.json", "README.md"
VERSION = 1
FIELDS = ("compressed", "bitmask", "row_offsets", "shape")
GATE_ORDER = {"LSTM": "i,f,g,o", "GRU": "r,z,n", "RNN_TANH": "h", "RNN_RELU": "h"}


def compress(values: Tensor, crow: Tensor, col: Tensor, num_cols: int) -> dict[str, Tensor]:
    """The four fields of a sparse matrix, see above.

    Args:
        values: (N,), row by row.
        crow: (R + 1,), where rows begin.
        col: (N,), the columns.
        num_cols: H.
    """
    mask = pattern.to_mask(crow, col, num_cols).cpu()
    padded = torch.nn.functional.pad(mask, (0, -num_cols % 8)).view(mask.shape[0], -1, 8)
    bits = padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return {
        "compressed": values.detach().cpu().contiguous(),
        "bitmask": bits.sum(-1, dtype=torch.uint8),
        "row_offsets": crow[:-1].to(device="cpu", dtype=torch.int64),
        "shape": torch.tensor(mask.shape, dtype=torch.int64),
    }


def expand(fields: Mapping[str, Tensor], name: str = "matrix") -> tuple[Tensor, Tensor]:
    """The dense matrix (R, H) and its mask from the four fields.

    Raises:
        SparseRNNFileError: fields are missing or contradict each other.
    """
    missing = [field for field in FIELDS if field not in fields]
    if missing:
        raise SparseRNNFileError(f"{name} lacks {', '.join(missing)}; it needs {', '.join(FIELDS)}")
    rows, cols = _shape(fields["shape"], name)
    bitmask, values = fields["bitmask"], fields["compressed"]
    if tuple(bitmask.shape) != (rows, -(-cols // 8)):
        raise SparseRNNFileError(
            f"{name}.bitmask has shape {tuple(bitmask.shape)} instead of {(rows, -(-cols // 8))}"
        )
    bits = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.view(rows, -1)[:, :cols].bool()
    counts = mask.sum(1)
    if tuple(values.shape) != (int(counts.sum()),):
        raise SparseRNNFileError(
            f"{name}.compressed has shape {tuple(values.shape)}, its bitmask {int(counts.sum())} "
            "bits that are set"
        )
    if not torch.equal(fields["row_offsets"].to(torch.int64), counts.cumsum(0) - counts):
        raise SparseRNNFileError(f"{name}.row_offsets are not where the bitmask's rows begin")
    dense = torch.zeros((rows, cols), dtype=values.dtype)
    dense[mask] = values
    return dense, mask


def write(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Path]:
    """Write a layer; one that is killed leaves what was there before.

    Args:
        folder: made if missing.
        config: arguments of the layer, with "mode" and "density".
        tensors: as they are in the file.

    Returns:
        The files that hold tensors.
    """
    folder = Path(folder)
    described = {"model_type": "fivefold_sparse_rnn", "format_version": VERSION, **config}
    described["gate_order"] = GATE_ORDER[str(config["mode"])]
    metadata = {"format": "pt"} | {
        key: json.dumps(value) for key, value in described.items() if key != "model_type"
    }
    plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    written = hub.write_sharded(folder, plan, tensors.items(), metadata=metadata)
    if not (folder / CARD).exists():
        hub.atomic_write_text(folder / CARD, layer_card(config))
    # Last: a folder without it is no layer to anyone.
    hub.write_json(folder / CONFIG, described)
    return written


def read(
    name_or_path: str | Path, revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a layer, and its state dict in torch's spelling with masks.

    Args:
        name_or_path: a folder, or a repository of the Hugging Face Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        SparseRNNFileError: the folder cannot be had, or is not that of a layer.
    """
    try:
        folder = hub.resolve(name_or_path, revision)
        config = _read_config(folder / CONFIG)
        with hub.SafetensorsReader(folder) as reader:
            found = {name: reader.read(name) for name in reader.names()}
    except CheckpointError as error:
        raise SparseRNNFileError(str(error)) from error
    return config, _state(found)


def push(
    folder_writer: Any, repo_id: str, *, private: bool | None, token: str | None, message: str
) -> str:
    """Write to a temporary folder and upload that; the repository's address."""
    with TemporaryDirectory() as folder:
        folder_writer(folder)
        return hub.push(folder, repo_id, private=private, commit_message=message, token=token)


def _state(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    sparse = {name.removesuffix(".compressed") for name in found if name.endswith(".compressed")}
    for name in sorted(sparse):
        fields = {field: found[f"{name}.{field}"] for field in FIELDS if f"{name}.{field}" in found}
        state[name], mask = expand(fields, name)
        state[f"{name}_mask"] = mask
    taken = {f"{name}.{field}" for name in sparse for field in FIELDS}
    return state | {name: tensor for name, tensor in found.items() if name not in taken}


def _shape(shape: Tensor, name: str) -> tuple[int, int]:
    if shape.numel() != 2 or bool((shape < 0).any()):
        raise SparseRNNFileError(f"{name}.shape holds {shape.tolist()} instead of rows and columns")
    rows, cols = (int(size) for size in shape)
    return rows, cols


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SparseRNNFileError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SparseRNNFileError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "fivefold_sparse_rnn":
        raise SparseRNNFileError(f"{path} does not describe a layer of this package")
    if config.get("format_version") != VERSION:
        raise SparseRNNFileError(
            f"{path} has format version {config.get('format_version')!r}; this version reads "
            f"{VERSION}"
        )
    missing = {"mode", "input_size", "hidden_size", "num_layers"} - config.keys()
    if missing:
        raise SparseRNNFileError(f"{path} lacks {', '.join(sorted(missing))}")
    return config
