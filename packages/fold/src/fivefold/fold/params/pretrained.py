"""Networks as files: read from our folders and from what others wrote, saved and published."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.errors import FoldConfigError, FoldParametersError
from fivefold.fold.params.convert import merge_projections, to_alphafold, to_flat
from fivefold.fold.params.formats import open_parameters
from fivefold.fold.params.names import Style, table
from fivefold.parallel_core import hub
from fivefold.parallel_core.files import atomic_file, atomic_write_text, write_json

CONFIG, CARD = "config.json", "README.md"
MODEL_TYPE = "fivefold_fold"
EXPORTS = ("alphafold", "openfold", "mlperf", "scalefold")

_CARD = """---
library_name: fivefold-fold
tags:
- biology
- protein-structure
- alphafold
---

# AlphaFold 2, {parameters:,} parameters

{blocks} Evoformer blocks, {templates} templates, {error} predicted aligned errors.

```python
from fivefold.fold import AlphaFold
model = AlphaFold.from_pretrained("this repository or folder")
```
"""


class Pretrained(nn.Module):
    """Adds reading, saving, publishing and exporting to a network."""

    config: AlphaFoldConfig

    def __init__(self, config: AlphaFoldConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: AlphaFoldConfig | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a network in eval mode.

        Args:
            path: our folder or a repository of one, AlphaFold's ``.npz``, a ``.pt`` of OpenFold
                (version 1 or 2, or of its training), MLPerf or ScaleFold, or a folder of DeepSpeed.
            config: of the network; None is what the files say or, where they do not, the network
                of AlphaFold's widths that the names belong to.
            revision: branch, tag or commit of the repository.

        Raises:
            FoldParametersError: the parameters are not those of the network.
            FoldConfigError: ``config.json`` is missing or describes no network.
            CheckpointError: there is no such folder or repository, or its files are damaged.
        """
        file = Path(path).expanduser()
        foreign = file.is_file() or (file.is_dir() and not (file / CONFIG).is_file())
        if foreign:
            found = open_parameters(file)
            config = config or found.config()
            return cls._of(config, found.ours(config))
        folder = hub.resolve(path, revision)
        config = config or read_config(folder)
        with hub.SafetensorsReader(folder) as reader:
            return cls._of(config, {name: reader.read(name) for name in reader.names()})

    @classmethod
    def _of(cls, config: AlphaFoldConfig, tensors: dict[str, Tensor]) -> Self:
        """A network whose parameters are the tensors themselves."""
        with torch.device("meta"):
            model = cls(config)
        needed = {name: tuple(value.shape) for name, value in model.named_parameters()}
        for name, shape in needed.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise FoldParametersError(
                    f"{name} has shape {found or 'none: it is missing'}, the network's is {shape}"
                )
        unknown = sorted(tensors.keys() - needed.keys())
        if unknown:
            raise FoldParametersError(
                f"{len(unknown)} parameters are none of the network's: {', '.join(unknown[:3])}"
            )
        model.load_state_dict(tensors, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_()
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write ``config.json``, safetensors and a card; a killed save leaves what was there.

        Args:
            folder: made if missing; a card that is there is kept.
            max_shard_size: bytes, or text such as ``"5GB"``, of one file.
        """
        folder = Path(folder)
        named = list(self.named_parameters())
        plan = [(name, value.shape, value.dtype) for name, value in named]
        hub.write_sharded(folder, plan, iter(named), max_shard_size)
        write_json(folder / CONFIG, {"model_type": MODEL_TYPE, "model": self.config.to_dict()})
        if not (folder / CARD).exists():
            atomic_write_text(folder / CARD, self._card())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Save to a temporary folder and upload that; returns the repository's address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message or "Upload model",
                token=token,
            )

    def export(self, path: str | Path, style: str) -> None:
        """Write the parameters for others, bit for bit.

        Args:
            path: file; AlphaFold's ends in ``.npz``.
            style: "alphafold", "openfold" (version 2), "mlperf" or "scalefold".

        Raises:
            FoldParametersError: no such style.
        """
        if style not in EXPORTS:
            raise FoldParametersError(f"no style {style!r}; there are {', '.join(EXPORTS)}")
        known, tensors = table(self.config), dict(self.named_parameters())
        if style == "alphafold":
            arrays = to_alphafold({name: x.float() for name, x in tensors.items()}, known)
            with atomic_file(path) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            return
        flat_style: Style = "openfold" if style == "openfold" else "mlperf"
        flat = to_flat(tensors, known, flat_style)
        with atomic_file(path) as file:
            torch.save(merge_projections(flat) if style == "scalefold" else flat, file)

    def _card(self) -> str:
        parameters = sum(value.numel() for value in self.parameters())
        return _CARD.format(
            parameters=parameters,
            blocks=self.config.evoformer.num_blocks,
            templates="with" if self.config.template else "without",
            error="with" if self.config.heads.aligned_error else "without",
        )


def read_config(folder: str | Path) -> AlphaFoldConfig:
    """Read ``config.json`` of a folder that ``save_pretrained`` wrote.

    Raises:
        FoldConfigError: it is missing, no JSON, or of another kind of model.
    """
    path = Path(folder) / CONFIG
    try:
        described: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FoldConfigError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FoldConfigError(f"{path} is no JSON: {error}") from None
    kind = described.get("model_type") if isinstance(described, dict) else None
    if kind != MODEL_TYPE:
        raise FoldConfigError(f"{path} has the model_type {kind!r}; {MODEL_TYPE!r} can be read")
    return AlphaFoldConfig.from_dict(described["model"], where="model")
