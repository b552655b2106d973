"""Files of parameters that others wrote: what they hold, under which names, in which wrapper.

AlphaFold's ``.npz``; OpenFold's ``.pt`` of versions 1 and 2, plain, of its training (with an
average of weights), of Lightning and of DeepSpeed; MLPerf's reference and its resumable checkpoint;
ScaleFold's with merged projections.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.errors import FoldParametersError
from fivefold.fold.params.convert import from_alphafold, from_flat, split_merged
from fivefold.fold.params.infer import infer_config
from fivefold.fold.params.names import Style, table

# The layers that hold the parameters of a checkpoint, best first.
_WRAPPERS = (
    ("ema", "params"),
    ("alphafold_state_dict",),
    ("state_dict",),
    ("module",),
    ("model",),
)
_PREFIXES = ("module.model.", "module.", "model.")

# Names of OpenFold's version 1, in the order in which they are looked for.
_RENAMES = (
    (r"^template_angle_embedder\.", "template_single_embedder."),
    (r"\.core\.(msa_transition|outer_product_mean)\.", r".\1."),
    (r"\.core\.(tri_|pair_transition)", r".pair_stack.\1"),
    (r"\.ipa\.(linear_q_points|linear_kv_points)\.(weight|bias)$", r".ipa.\1.linear.\2"),
    (r"^template_(?!embedder\.)", "template_embedder.template_"),
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters as a file holds them.

    Attributes:
        style: whose names they have.
        tensors: by name; AlphaFold's as arrays.
    """

    style: Style
    tensors: Mapping[str, Any]

    def config(self) -> AlphaFoldConfig:
        """The network they belong to."""
        shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        return infer_config(shapes, self.style)

    def ours(self, config: AlphaFoldConfig | None = None) -> dict[str, Tensor]:
        """Under our names, for ``config`` or for the network that they belong to.

        Raises:
            FoldParametersError: they are not those of ``config``.
        """
        known = table(config or self.config())
        if self.style == "alphafold":
            return from_alphafold(self.tensors, known)
        return from_flat(self.tensors, known, self.style)


def open_parameters(path: str | Path) -> Parameters:
    """Read AlphaFold's ``.npz`` or a checkpoint of OpenFold, MLPerf or ScaleFold.

    Args:
        path: file, or folder of a DeepSpeed checkpoint.

    Raises:
        FoldParametersError: there is no such file, or it holds no parameters that are known.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return Parameters("alphafold", _read_npz(path))
    return flat_parameters(unwrap(_read_torch(_checkpoint_file(path))))


def flat_parameters(tensors: Mapping[str, Tensor]) -> Parameters:
    """Parameters of flat names: ScaleFold's split, OpenFold's version 1 renamed to version 2."""
    tensors = split_merged(tensors)
    if any(name.startswith("evoformer_stack.") for name in tensors):
        return Parameters("mlperf", tensors)
    return Parameters("openfold", {rename_version_1(name): x for name, x in tensors.items()})


def rename_version_1(name: str) -> str:
    """A name of OpenFold's version 1 as version 2 has it; one of version 2 as it is."""
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The parameters inside a checkpoint, without prefixes.

    Raises:
        FoldParametersError: nothing inside is a dictionary of tensors.
    """
    found = checkpoint
    for keys in _WRAPPERS:
        inner = _inside(checkpoint, keys)
        if inner is not None:
            found = inner
            break
    if not isinstance(found, Mapping) or not found or not _all_tensors(found):
        held = list(checkpoint)[:5] if isinstance(checkpoint, Mapping) else type(checkpoint)
        raise FoldParametersError(
            f"a checkpoint with {held} holds no parameters; known are a flat dictionary and one "
            f"inside {', '.join('/'.join(keys) for keys in _WRAPPERS)}"
        )
    return _without_prefix(found)


def _inside(checkpoint: object, keys: tuple[str, ...]) -> Mapping[str, Any] | None:
    for key in keys:
        if not isinstance(checkpoint, Mapping) or key not in checkpoint:
            return None
        checkpoint = checkpoint[key]
    return checkpoint if isinstance(checkpoint, Mapping) else None


def _all_tensors(found: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in found.values())


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them; counters of averages are left out."""
    kept = {name: value for name, value in tensors.items() if name != "n_averaged"}
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in kept)), "")
    return {name.removeprefix(prefix): value for name, value in kept.items()}


def _checkpoint_file(path: Path) -> Path:
    """The file itself, or that of the model in a folder that DeepSpeed wrote."""
    if not path.is_dir():
        return path
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(files) != 1:
        raise FoldParametersError(
            f"{folder} has {len(files)} files mp_rank_*_model_states.pt; one is what can be read"
        )
    return files[0]


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FoldParametersError(f"there is no file {path}") from None
    except Exception as error:
        raise FoldParametersError(f"{path} is no checkpoint of tensors: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise FoldParametersError(f"there is no file {path}") from None
    except (BadZipFile, ValueError, OSError) as error:
        raise FoldParametersError(f"{path} is no .npz of arrays: {error}") from error
