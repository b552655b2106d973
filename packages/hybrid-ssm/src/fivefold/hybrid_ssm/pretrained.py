"""Model folders as transformers and the first releases have them: reading, writing, publishing."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.card import model_card
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError, HybridInputError, HybridWeightsError
from fivefold.hybrid_ssm.files import ModelFiles, disk_specs, disk_tensors, load_parameters
from fivefold.hybrid_ssm.hf import check_names, stored_tensors
from fivefold.hybrid_ssm.precision import KeepsFloat32
from fivefold.parallel_core import hub
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.parallel_core.parameters import Piece
    from fivefold.parallel_core.topology import Topology

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
QUANTISATION = "hf_quant_config.json"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class Pretrained(nn.Module):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model.

    Attributes:
        config: the model's.
        kept: tensors of the files that the model does not run (prediction depths), by their names
            there; written again by ``save_pretrained``.
    """

    config: HybridConfig

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.kept: dict[str, Tensor] = {}

    def tie_weights(self) -> None:
        """Make parameters that are one parameter the same object again."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        topology: "Topology | None" = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a model from a folder or repository in transformers' form, in eval mode.

        The weights are read straight into place, without being initialised first, and each
        process reads only what it holds. Files of ModelOpt in FP8 are read with their scales.

        Args:
            name_or_path: folder with ``config.json`` and safetensors, or repository of one.
            topology: ranks to lay the model over; this rank's pipeline stage is returned. None
                is the whole model on torch's default device.
            dtype: of the parameters: a floating-point type of at least 16 bits, or its name such
                as ``"bfloat16"``. None is what ``config.json`` says or, where it says nothing, the
                type of most elements in the files. Decays, time steps and routers' biases are
                never in a narrower type than in the files.
            revision: branch, tag or commit of the repository.

        Raises:
            HybridConfigError: the configuration is missing or not supported.
            HybridInputError: ``dtype`` is no such type.
            CheckpointError: files are missing, damaged, or not the weights of this model.
        """
        asked = None if dtype is None else _asked_dtype(dtype)
        folder = hub.resolve(name_or_path, revision)
        config = read_config(folder)
        with hub.SafetensorsReader(folder) as reader:
            check_names(config, reader.names())
            files = ModelFiles(reader)
            held = _held_dtype(config, files)
            dtype = asked or _config_dtype(folder) or held
            model, pieces = cls._allocate(config, topology, dtype)
            pieces = _widen(model, pieces, config, files, dtype)
            load_parameters(pieces, config, files)
            model.kept = files.kept(dtype)
        return model.eval()

    @classmethod
    def _allocate(
        cls, config: HybridConfig, topology: "Topology | None", dtype: torch.dtype
    ) -> "tuple[Self, list[Piece]]":
        """The model, or this rank's part of it, with memory but no values."""
        from fivefold.parallel_core.parameters import ParameterTable

        if topology is not None:
            return cls._allocate_part(config, topology, dtype)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=torch.get_default_device())
        model.tie_weights()
        return model, ParameterTable.of(model).pieces(model)

    @classmethod
    def _allocate_part(
        cls, config: HybridConfig, topology: "Topology", dtype: torch.dtype
    ) -> "tuple[Self, list[Piece]]":
        from fivefold.hybrid_ssm import sharding
        from fivefold.parallel_core.build import build

        sharding.check(config, topology.layout)
        built = build(
            lambda: cls(config),
            topology,
            sharding.plan(config),
            head=sharding.HEAD,
            tail=sharding.TAIL,
            dtype=dtype,
        )
        (model,) = built.parts
        return cast("Self", model), built.pieces()

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write the model as transformers does: configuration, safetensors, model card.

        Transformers' own class and the first releases' remote code both load the folder. A save
        that is killed leaves what was there before, or a folder that no reader takes.

        Args:
            folder: made if missing; a model card that is there is kept.
            max_shard_size: bytes, or text such as ``"5GB"``, of one safetensors file.

        Raises:
            HybridWeightsError: this process holds only a part of the model.
        """
        parameters = dict(self.named_parameters())
        for name, shape in parameter_shapes(self.config).items():
            held = tuple(parameters[name].shape) if name in parameters else None
            if held != shape:
                raise HybridWeightsError(
                    f"cannot save {name!r} of shape {shape}: this process holds "
                    f"{held or 'nothing'} of it"
                )
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        write_folder(
            folder, self.config, dtypes, parameters.items(), max_shard_size, kept=self.kept
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Save to a temporary folder and upload that; arguments as ``hub.push``.

        Returns:
            The repository's address.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size)
            return hub.push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message or "Upload model",
                token=token,
            )


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HybridConfigError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HybridConfigError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(described, dict):
        raise HybridConfigError(
            f"{path} is not a JSON object: it holds a {type(described).__name__}"
        )
    return described


def _named_dtype(value: object) -> torch.dtype | None:
    """A type that a model may have, or its name with or without ``torch.``."""
    return _DTYPES.get(str(value).removeprefix("torch."))


def _asked_dtype(value: torch.dtype | str) -> torch.dtype:
    dtype = _named_dtype(value)
    if dtype is None:
        raise HybridInputError(f"dtype is {value!r}; legal: {', '.join(_DTYPES)}, or None")
    return dtype


def _config_dtype(folder: str | Path) -> torch.dtype | None:
    """The type in ``config.json``, as version 5 or version 4 writes it; None if it has none."""
    described = _read_json(Path(folder) / CONFIG)
    for key in ("dtype", "torch_dtype"):
        value = described.get(key)
        if value is not None:
            dtype = _named_dtype(value)
            if dtype is None:
                raise HybridConfigError(
                    f"{key} is {value!r} in config.json; legal: {', '.join(_DTYPES)}"
                )
            return dtype
    return None


def _held_dtype(config: HybridConfig, files: ModelFiles) -> torch.dtype:
    """The type of most elements of the model in the files, all of them checked."""
    specs = []
    for stored in stored_tensors(config):
        if config.tie_word_embeddings and stored.name == "lm_head.weight":
            continue
        dtype = files.dtype(stored.name)
        if dtype not in _DTYPES.values():
            raise HybridWeightsError(
                f"{stored.name!r} on disk is of {dtype}; legal: {', '.join(_DTYPES)}, and "
                "float8_e4m3fn with a scale"
            )
        specs.append((stored.name, stored.shape, dtype))
    return _main_dtype(specs)


def _main_dtype(specs: Iterable[Spec]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for _, shape, dtype in specs:
        sizes[dtype] += prod(shape)
    return sizes.most_common(1)[0][0]


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
    parameters = dict(model.named_parameters())
    return [
        type(piece)(piece.name, parameters[piece.name], piece.box, piece.placement, piece.counted)
        for piece in pieces
    ]


def parameter_shapes(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter of the model."""
    from fivefold.hybrid_ssm.model import HybridForCausalLM

    with torch.device("meta"):
        model = HybridForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


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
    folder, kept = Path(folder), kept or {}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        hub.atomic_write_text(folder / CARD, model_card(config))
    described = config.to_hf()
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hub.write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    specs = disk_specs(config, dtypes)
    specs += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()]

    def tensors() -> Iterable[tuple[str, Tensor]]:
        yield from disk_tensors(config, parameters)
        yield from kept.items()

    hub.write_sharded(folder, specs, tensors(), max_shard_size)
    # Last: a folder without it is no model to anyone.
    dtype = str(_main_dtype(specs)).removeprefix("torch.")
    hub.write_json(folder / CONFIG, described | {"dtype": dtype})
