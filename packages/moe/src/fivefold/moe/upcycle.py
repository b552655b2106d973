"""From a dense language model to a mixture of experts that starts as the same function.

Every expert starts as a copy of the dense network (Sparse Upcycling, arXiv 2212.05055); with a
granularity G the network is cut into G slices of its inner width, and each copy becomes G experts
(2410.07524, section 3.2). The router's rows are drawn once for each copy and repeated for its
slices, so that a token that chooses a copy chooses all of it, and each slice once.

Legend: H hidden width, F inner width of the dense network, G slices, C copies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError, MoEWeightsError
from fivefold.moe.families import FAMILIES
from fivefold.moe.hf import hf_sources, parameter_shapes
from fivefold.moe.hf_config import config_from_hf
from fivefold.moe.pretrained import write_folder
from fivefold.parallel_core import hub
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.hub.pretrained import CONFIG, main_dtype, read_json

TARGETS: Mapping[str, str] = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}
"""Dense families of transformers, and the family that has the same attention."""

_GATE, _UP, _DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcycleConfig(Config):
    """How a dense model becomes a mixture of experts.

    Attributes:
        copies: C; there are C * G experts.
        copies_per_token: copies that a token uses; it uses so many times G experts.
        granularity: G, a divisor of the dense inner width.
        router_std: standard deviation of the router's weights.
        seed: of the router's weights.
    """

    copies: int
    copies_per_token: int
    granularity: int = 1
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "copies": (self.copies >= 1, "at least 1"),
            "copies_per_token": (
                1 <= self.copies_per_token <= self.copies,
                f"from 1 to copies {self.copies}",
            ),
            "granularity": (self.granularity >= 1, "at least 1"),
            "router_std": (self.router_std > 0, "above 0, or all tokens go to the same experts"),
        }
        for name, (legal, rule) in rules.items():
            if not legal:
                raise MoEConfigError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


def upcycled_config(dense: Mapping[str, Any], config: UpcycleConfig) -> MoEConfig:
    """The configuration of the mixture that a dense model becomes.

    Args:
        dense: transformers' ``config.json`` of a model of one of ``TARGETS``.
        config: how.

    Raises:
        MoEConfigError: another model, or a width that G does not divide.
    """
    kind = dense.get("model_type")
    if kind not in TARGETS:
        raise MoEConfigError(
            f"a model of type {kind!r} cannot be upcycled; legal: {', '.join(TARGETS)}"
        )
    width = dense.get("intermediate_size")
    if not isinstance(width, int) or width % config.granularity:
        raise MoEConfigError(
            f"intermediate_size {width!r} of the dense model cannot be cut into granularity="
            f"{config.granularity} slices"
        )
    described = dict(dense) | _described(TARGETS[str(kind)], width, config)
    return config_from_hf(described)


def _described(target: str, width: int, config: UpcycleConfig) -> dict[str, Any]:
    """What the mixture's ``config.json`` says beyond the dense model's."""
    sizes = {
        "num_experts": config.copies * config.granularity,
        "num_experts_per_tok": config.copies_per_token * config.granularity,
        "moe_intermediate_size": width // config.granularity,
    }
    of_target: dict[str, dict[str, Any]] = {
        "mixtral": {
            "num_local_experts": sizes["num_experts"],
            "intermediate_size": sizes["moe_intermediate_size"],
        },
        "qwen2_moe": {"shared_expert_intermediate_size": width, "norm_topk_prob": True},
        "qwen3_moe": {"norm_topk_prob": True},
    }
    both = {"model_type": target, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return {**both, **sizes, **of_target[target]}


def upcycle(
    name_or_path: str | Path,
    output: str | Path,
    config: UpcycleConfig,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
) -> MoEConfig:
    """Write the mixture of experts that a dense model becomes, layer by layer.

    At the start it gives the dense model's logits: a token's weights sum to 1 over the copies that
    it uses, and each slice is multiplied by G in its last matrix, since a copy's weight is shared
    among its slices. A family that has a shared expert gets the dense network there too, weighed by
    sigmoid(0) = 1/2 like what its other experts give together.

    Args:
        name_or_path: folder or repository of a dense model in transformers' form.
        output: folder to write, in transformers' form.
        config: how.
        revision: branch, tag or commit of the repository.
        max_shard_size: bytes, or text such as ``"5GB"``, of one safetensors file.

    Returns:
        The configuration of the mixture.

    Raises:
        MoEConfigError: the dense model is not one of ``TARGETS``, or cannot be cut so.
        MoEWeightsError: its files lack a tensor.
    """
    folder = hub.resolve(name_or_path, revision)
    mixture = upcycled_config(read_json(Path(folder) / CONFIG, MoEConfigError), config)
    with hub.SafetensorsReader(folder) as reader:
        dtype = main_dtype([(n, reader.shape(n), reader.dtype(n)) for n in reader.names()])
        names = list(parameter_shapes(mixture))
        maker = _Maker(mixture, config, reader, dtype)
        tensors: Iterator[tuple[str, Tensor]] = ((name, maker.make(name)) for name in names)
        write_folder(output, mixture, dict.fromkeys(names, dtype), tensors, max_shard_size)
    return mixture


class _Maker:
    """Makes the mixture's parameters from the dense model's, one at a time."""

    def __init__(
        self,
        mixture: MoEConfig,
        config: UpcycleConfig,
        reader: hub.SafetensorsReader,
        dtype: torch.dtype,
    ):
        self.mixture, self.config, self.reader, self.dtype = mixture, config, reader, dtype

    def make(self, name: str) -> Tensor:
        """The parameter that the mixture calls ``name``."""
        if name.startswith("layers.") and ".mlp." in name:
            _, layer, _, part = name.split(".", 3)
            return self._of_experts(f"model.layers.{layer}.", part, int(layer))
        return self._read(_dense_name(self.mixture, name))

    def _read(self, name: str) -> Tensor:
        if name not in self.reader:
            raise MoEWeightsError(f"the dense model in {self.reader.folder} has no {name!r}")
        return self.reader.read(name).to(self.dtype)

    def _of_experts(self, layer: str, part: str, index: int) -> Tensor:
        config, copies = self.config, self.config.copies
        if part == "router.weight":
            return self._router(index)
        if part == "shared_gate.weight":
            return torch.zeros(1, self.mixture.hidden_size, dtype=self.dtype)
        if part.startswith("shared."):
            return self._read(layer + _SHARED[part])
        if part == "experts.gate_up":
            halves = [self._read(layer + name) for name in (_GATE, _UP)]  # (F, H) each
            cut = torch.stack([half.unflatten(0, (config.granularity, -1)) for half in halves], 1)
            return cut.repeat(copies, 1, 1, 1)
        down_hf = self._read(layer + _DOWN) * config.granularity * self._routed_share()
        slices_ghf = down_hf.unflatten(1, (config.granularity, -1)).movedim(1, 0)
        return slices_ghf.repeat(copies, 1, 1)

    def _routed_share(self) -> float:
        """What the routed experts give of the dense network."""
        return 0.5 if self.mixture.shared_gate else 1.0

    def _router(self, layer: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.config.seed << 20) + layer)
        rows = torch.randn(self.config.copies, self.mixture.hidden_size, generator=generator)
        rows = rows * self.config.router_std
        return rows.repeat_interleave(self.config.granularity, dim=0).to(self.dtype)


_SHARED = {
    "shared.gate_up.gate_proj.weight": _GATE,
    "shared.gate_up.up_proj.weight": _UP,
    "shared.down.weight": _DOWN,
}


def _dense_name(mixture: MoEConfig, name: str) -> str:
    """The dense model's name of a parameter that both have."""
    ((source, _),) = hf_sources(mixture, name, ())
    return source


def describe(mixture: MoEConfig) -> str:
    """One line on what came out."""
    return (
        f"{FAMILIES[mixture.model_type].architecture}: {mixture.num_experts} experts of width "
        f"{mixture.expert_intermediate_size}, {mixture.num_experts_per_token} of them for a token"
    )
