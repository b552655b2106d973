"""Model folders as transformers and the first releases have them: reading and writing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.card import model_card
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError, HybridInputError, HybridWeightsError
from fivefold.hybrid_ssm.files import (
    BIAS,
    ModelFiles,
    disk_specs,
    disk_tensors,
    load_parameters,
    saved_tensors,
)
from fivefold.hybrid_ssm.hf import check_names, stored_tensors
from fivefold.hybrid_ssm.precision import KeepsFloat32
from fivefold.parallel_core import hub
from fivefold.parallel_core.hub import pretrained
from fivefold.parallel_core.hub.pretrained import CARD, CONFIG, GENERATION
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.parallel_core.build import ParallelModel
    from fivefold.parallel_core.parameters import Piece
    from fivefold.parallel_core.topology import Topology

__all__ = [
    "CARD",
    "CONFIG",
    "GENERATION",
    "QUANTISATION",
    "Pretrained",
    "parameter_shapes",
    "read_config",
    "write_folder",
]

QUANTISATION = "hf_quant_config.json"
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


class Pretrained(pretrained.Pretrained):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model.

    Files of ModelOpt in FP8 are read with their scales. Decays, time steps and routers' biases are
    never in a narrower type than in the files. Transformers' own class and the first releases'
    remote code both load what is saved.

    Attributes:
        config: the model's.
        kept: tensors of the files that the model does not run (prediction depths), by their names
            there; written again by ``save_pretrained``.
    """

    config: HybridConfig
    faults = pretrained.Faults(
        config=HybridConfigError, argument=HybridInputError, weights=HybridWeightsError
    )

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.kept: dict[str, Tensor] = {}

    @classmethod
    def _read_config(cls, folder: Path) -> HybridConfig:
        return read_config(folder)

    @classmethod
    def _stored(cls, config: HybridConfig, reader: hub.SafetensorsReader) -> list[Spec]:
        check_names(config, reader.names())
        files = ModelFiles(reader)
        specs: list[Spec] = [
            (stored.name, stored.shape, files.dtype(stored.name))
            for stored in stored_tensors(config)
            if not (config.tie_word_embeddings and stored.name == "lm_head.weight")
        ]
        pretrained.check_dtypes(specs, HybridWeightsError, ", and float8_e4m3fn with a scale")
        return specs

    @classmethod
    def _part(
        cls, config: HybridConfig, topology: "Topology", dtype: torch.dtype
    ) -> "ParallelModel":
        from fivefold.hybrid_ssm import sharding
        from fivefold.parallel_core.build import build

        sharding.check(config, topology.layout)
        return build(
            lambda: cls(config),
            topology,
            sharding.plan(config),
            head=sharding.HEAD,
            tail=sharding.TAIL,
            dtype=dtype,
        )

    def _fill(
        self, pieces: "list[Piece]", reader: hub.SafetensorsReader, dtype: torch.dtype
    ) -> None:
        files = ModelFiles(reader)
        load_parameters(_widen(self, pieces, self.config, files, dtype), self.config, files)
        self.kept = files.kept(dtype)

    def _saved(self) -> tuple[dict[str, Tensor], Mapping[str, tuple[int, ...]]]:
        return saved_tensors(self), parameter_shapes(self.config)

    def _write(self, folder: Path, saved: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        dtypes = {name: tensor.dtype for name, tensor in saved.items()}
        write_folder(folder, self.config, dtypes, saved.items(), max_shard_size, kept=self.kept)


def read_config(folder: str | Path) -> HybridConfig:
    """Read ``config.json`` of a model folder.

    Raises:
        HybridConfigError: the file is missing, is no JSON object, or describes another model or
            a quantisation that is not read here.
    """
    described = _read_json(Path(folder) / CONFIG)
    _check_quantisation(described.get("quantization_config"), CONFIG)
    beside = Path(folder) / QUANTISATION
    if beside.exists():
        _check_quantisation(_read_json(beside).get("quantization"), QUANTISATION)
    return HybridConfig.from_hf(described)


def _read_json(path: Path) -> dict[str, Any]:
    return pretrained.read_json(path, HybridConfigError)


def _check_quantisation(found: Any, file: str) -> None:
    """Refuse what is not ModelOpt's FP8 with one scale for a tensor."""
    if found is None:
        return
    algorithm = found.get("quant_algo") if isinstance(found, Mapping) else found
    if algorithm != "FP8":
        raise HybridConfigError(
            f"the files are quantised with quant_algo {algorithm!r} ({file}); those with 'FP8' of "
            "ModelOpt are read, and those that are not quantised"
        )


def _widen(
    model: nn.Module,
    pieces: "list[Piece]",
    config: HybridConfig,
    files: ModelFiles,
    dtype: torch.dtype,
) -> "list[Piece]":
    """Give the parameters that need it the wider of ``dtype`` and their type in the files."""
    homes = {part.name: stored.name for stored in stored_tensors(config) for part in stored.parts}
    for prefix, module in model.named_modules():
        for key in module.wide if isinstance(module, KeepsFloat32) else ():
            old = module.get_parameter(key)
            wider = torch.promote_types(dtype, files.dtype(homes[f"{prefix}.{key}"]))
            new = nn.Parameter(torch.empty_like(old, dtype=wider), requires_grad=old.requires_grad)
            setattr(module, key, new)
    for name, tensor in saved_tensors(model).items():
        if name.endswith(BIAS):
            wider = torch.promote_types(tensor.dtype, files.dtype(homes[name]))
            model.get_submodule(name.removesuffix(".bias")).bias = torch.empty_like(
                tensor, dtype=wider
            )
    parameters = saved_tensors(model)
    return [
        type(piece)(piece.name, parameters[piece.name], piece.box, piece.placement, piece.counted)
        for piece in pieces
    ]


def parameter_shapes(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of all that a model's files hold: parameters, and routers' biases."""
    from fivefold.hybrid_ssm.model import HybridForCausalLM

    with torch.device("meta"):
        model = HybridForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}


def write_folder(
    folder: str | Path,
    config: HybridConfig,
    dtypes: Mapping[str, torch.dtype],
    parameters: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = "5GB",
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder from parameters that arrive one at a time.

    Args:
        folder: made if missing; a model card that is there is kept.
        config: the model's configuration.
        dtypes: dtype of every parameter.
        parameters: global name and whole tensor in the model's order, consumed one at a time, so
            that a generator may gather them from other ranks.
        max_shard_size: bytes, or text such as ``"5GB"``.
        kept: tensors that are written as they are.
    """
    kept = kept or {}
    specs = disk_specs(config, dtypes)
    specs += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()]

    def tensors() -> Iterable[tuple[str, Tensor]]:
        yield from disk_tensors(config, parameters)
        yield from kept.items()

    pretrained.write_folder(
        folder,
        config.to_hf(),
        specs,
        tensors(),
        card=model_card(config),
        generation=_GENERATION,
        max_shard_size=max_shard_size,
    )
