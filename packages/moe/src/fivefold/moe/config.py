"""The configuration of a mixture-of-experts language model, and transformers' dialect of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fivefold.moe.capacity_config import CapacityConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.families import FAMILIES, check_family
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.config import Config

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "expert_intermediate_size",
    "num_experts",
    "num_experts_per_token",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig(Config):
    """The shape of a model; plain data, checked when made.

    Args:
        model_type: family of the model, as transformers names it; see ``families``.
        vocab_size: rows of the token embedding.
        hidden_size: width between layers.
        num_layers: attention plus experts, each.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; 0 for as many.
        head_dim: width of a head, even; 0 for ``hidden_size / num_attention_heads``.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        qk_norm: whether each head's queries and keys are normed before they are rotated.
        rotary_fraction: share of a head's width that is rotated, from its start.
        expert_intermediate_size: inner width of one expert.
        num_experts: experts of a layer.
        num_experts_per_token: experts that each token uses.
        shared_intermediate_size: inner width of the expert that every token uses; 0 for none.
        shared_gate: whether a sigmoid of the token weighs the shared expert.
        dense_layers: indices of the layers that have one network for all tokens instead.
        intermediate_size: inner width of that network; 0 where there is none.
        router: how tokens choose their experts.
        capacity: how many tokens an expert takes in training; the default takes all.
        max_position_embeddings: longest sequence that the model is meant for.
        rope_theta: base of the rotary embedding's wavelengths.
        norm_eps: added to the mean square in every norm.
        tie_word_embeddings: whether the output layer is the embedding matrix.
        sliding_window: how many positions a token sees, itself included; None for all before it.
        initializer_range: standard deviation of new weight matrices.
        bos_token_id: starts a text; None where the model has none.
        eos_token_id: ends a text, one id or several; None where the model has none.

    Raises:
        MoEConfigError: a value is impossible; names it and what would be legal.

    >>> config = MoEConfig(vocab_size=100, hidden_size=64, num_layers=2, num_attention_heads=4,
    ...                    expert_intermediate_size=96, num_experts=8, num_experts_per_token=2)
    >>> config.head_dim
    16
    """

    model_type: Literal["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"] = "mixtral"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    rotary_fraction: float = 1.0
    expert_intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    intermediate_size: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    max_position_embeddings: int = 4096
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        _check_sizes(self, *_SIZES)
        if not self.head_dim:
            _check_divides(self, "hidden_size", "num_attention_heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_sizes(self, "head_dim")
        _check_divides(self, "num_attention_heads", "num_key_value_heads")
        _check_values(self)
        _check_layers(self)
        self.router.check(self.num_experts, self.num_experts_per_token)
        check_family(self)

    @property
    def rotary_dim(self) -> int:
        """Width of a head's part that is rotated."""
        return int(self.head_dim * self.rotary_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; derived values stay 0, so that they follow when another value changes."""
        # Not super(): a slotted dataclass is made anew, and super() would look for the old class.
        data = Config.to_dict(self)
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            data["head_dim"] = 0
        if self.num_key_value_heads == self.num_attention_heads:
            data["num_key_value_heads"] = 0
        return data

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MoEConfig":
        """Read transformers' ``config.json`` of a model of one of the families.

        Versions 4 and 5 of it are read.

        Raises:
            MoEConfigError: a key is missing, or asks for what this package does not do; names
                the key and its value.
        """
        from fivefold.moe.hf_config import config_from_hf

        return config_from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """What transformers writes as ``config.json``."""
        from fivefold.moe.hf_config import config_to_hf

        return config_to_hf(self)


def _check_sizes(config: MoEConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise MoEConfigError(f"{name} is {value!r}; it must be an integer of at least 1")


def _check_divides(config: MoEConfig, name: str, divisor: str) -> None:
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise MoEConfigError(
            f"{name} {value} is not a multiple of {divisor} {by} (remainder {value % by})"
        )


def _check_values(config: MoEConfig) -> None:
    window, eos = config.sliding_window, config.eos_token_id
    ids = [config.bos_token_id, *(eos if isinstance(eos, tuple) else [eos])]
    rules = {
        "model_type": (config.model_type in FAMILIES, "one of " + ", ".join(map(repr, FAMILIES))),
        "num_experts_per_token": (
            config.num_experts_per_token <= config.num_experts,
            f"at most num_experts {config.num_experts}",
        ),
        "head_dim": (config.head_dim % 2 == 0, "even, for the rotary embedding"),
        "rotary_fraction": (
            0 < config.rotary_fraction <= 1 and config.rotary_dim % 2 == 0,
            f"above 0 and at most 1, and rotate an even part of head_dim {config.head_dim}",
        ),
        "shared_intermediate_size": (config.shared_intermediate_size >= 0, "at least 0"),
        "shared_gate": (
            bool(config.shared_intermediate_size) or not config.shared_gate,
            "false where shared_intermediate_size is 0",
        ),
        "sliding_window": (window is None or window >= 1, "at least 1, or None"),
        "rope_theta": (config.rope_theta > 0, "above 0"),
        "norm_eps": (config.norm_eps >= 0, "at least 0"),
        "initializer_range": (config.initializer_range >= 0, "at least 0"),
    }
    for name, (legal, rule) in rules.items():
        if not legal:
            raise MoEConfigError(f"{name} is {getattr(config, name)!r}; it must be {rule}")
    for token in ids:
        if token is not None and not 0 <= token < config.vocab_size:
            raise MoEConfigError(
                f"token id {token} is outside the vocabulary of {config.vocab_size}"
            )


def _check_layers(config: MoEConfig) -> None:
    """Check which layers are dense, and that they have a width."""
    dense = config.dense_layers
    wrong = [layer for layer in dense if not 0 <= layer < config.num_layers]
    if wrong or sorted(set(dense)) != list(dense):
        raise MoEConfigError(
            f"dense_layers is {dense!r}; it must be different layers from 0 to "
            f"{config.num_layers - 1}, in order"
        )
    if len(dense) == config.num_layers:
        raise MoEConfigError(
            f"dense_layers holds all {config.num_layers} layers; a model needs one with experts"
        )
    if bool(dense) != (config.intermediate_size > 0) or config.intermediate_size < 0:
        raise MoEConfigError(
            f"intermediate_size is {config.intermediate_size} with dense_layers {dense!r}; it must "
            "be at least 1 where there are such layers and 0 where there are none"
        )
