"""The configuration of a hybrid language model, and the dialects of it that files have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, MAMBA, MLP, check_pattern
from fivefold.parallel_core.config import Config

# Sizes that matter only where the pattern has such a layer; 0 says that there is none.
_SIZES_OF = {
    MAMBA: ("num_mamba_heads", "mamba_head_dim", "state_size", "num_groups", "conv_width"),
    ATTENTION: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    MLP: ("intermediate_size",),
    EXPERTS: (
        "num_experts",
        "num_experts_per_token",
        "expert_intermediate_size",
        "shared_intermediate_size",
        "num_expert_groups",
        "num_chosen_groups",
    ),
}
_SIZES = ("vocab_size", "hidden_size", "chunk_size", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig(Config):
    """The shape of a model; plain data, checked when made.

    Args:
        model_type: family of the model, as transformers names it.
        vocab_size: rows of the token embedding.
        hidden_size: width between layers.
        pattern: one letter for each layer, see ``pattern``.
        num_mamba_heads: heads of a Mamba-2 layer.
        mamba_head_dim: width of one; heads times width need not be a multiple of ``hidden_size``.
        state_size: length of the state of each channel.
        num_groups: heads of a group share B and C, and are normalised together.
        conv_width: taps of the causal convolution.
        chunk_size: tokens that other programs scan at once; results do not depend on it, and here
            the kernel chooses.
        time_step_limit: lowest and highest time step after softplus; None is no highest.
        time_step_min: lowest time step of a new model.
        time_step_max: highest time step of a new model.
        time_step_floor: no time step of a new model is below it.
        decay_range: -A of a new model.
        use_conv_bias: whether the convolution has a bias.
        use_bias: whether the projections of Mamba-2 have one.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; 0 for as many.
        head_dim: width of an attention head; 0 for ``hidden_size / num_attention_heads``.
        intermediate_size: inner width of an MLP.
        mlp_bias: whether MLPs, shared experts and latent projections have biases.
        num_experts: routed experts of a layer.
        num_experts_per_token: experts that each token uses.
        expert_intermediate_size: inner width of one expert.
        shared_intermediate_size: inner width of the expert that all tokens use.
        latent_size: width of the experts' inputs where they are projected; None for the hidden one.
        num_expert_groups: groups of experts, of which a token chooses some first.
        num_chosen_groups: how many.
        normalise_weights: whether the weights of a token's experts are made to sum to 1.
        routed_scaling_factor: by which the weights are multiplied then.
        bias_rate: how far a router's bias moves towards balance after a step of training; 0 leaves
            it as it is.
        aux_loss_coef: load balance loss of one layer and sequence when balanced.
        z_loss_coef: weight of the router's z-loss.
        num_nextn_predict_layers: prediction depths whose tensors the files have (kept, not run).
        mtp_pattern: layers of each of them.
        norm_eps: added to the mean square in every norm.
        residual_in_fp32: whether the sum over layers is kept in float32.
        tie_word_embeddings: whether the output layer is the embedding matrix.
        max_position_embeddings: longest sequence that the model is meant for; nothing depends on
            it, as there are no positions.
        initializer_range: standard deviation of new weight matrices.
        bos_token_id: starts a text; None where the model has none.
        eos_token_id: ends a text, one id or several; None where the model has none.
        pad_token_id: fills up; None where the model has none.

    Raises:
        HybridConfigError: a value is impossible; names it and what would be legal.

    >>> config = HybridConfig(vocab_size=100, hidden_size=64, pattern="M-M*-", num_mamba_heads=8,
    ...                       mamba_head_dim=16, state_size=16, num_groups=2, intermediate_size=96,
    ...                       num_attention_heads=4, num_key_value_heads=2)
    >>> config.num_layers, config.mamba_width, config.head_dim
    (5, 128, 16)
    """

    model_type: Literal["nemotron_h", "mamba2"] = "nemotron_h"
    vocab_size: int
    hidden_size: int
    pattern: str
    num_mamba_heads: int = 0
    mamba_head_dim: int = 64
    state_size: int = 128
    num_groups: int = 8
    conv_width: int = 4
    chunk_size: int = 128
    time_step_limit: tuple[float, float | None] = (0.0, None)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    decay_range: tuple[float, float] = (1.0, 16.0)
    use_conv_bias: bool = True
    use_bias: bool = False
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 2
    expert_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    latent_size: int | None = None
    num_expert_groups: int = 1
    num_chosen_groups: int = 1
    normalise_weights: bool = True
    routed_scaling_factor: float = 1.0
    bias_rate: float = 0.001
    aux_loss_coef: float = 0.0001
    z_loss_coef: float = 0.0
    num_nextn_predict_layers: int = 0
    mtp_pattern: str = "*E"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_pattern(self.mtp_pattern)
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim and self.num_attention_heads:
            _check_divides(self, "hidden_size", "num_attention_heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_sizes(self, _SIZES, "")
        for letter in sorted(self.kinds):
            _check_sizes(self, _SIZES_OF[letter], letter)
        _check_values(self)

    @property
    def kinds(self) -> frozenset[str]:
        """Letters of the layers that there are, prediction depths included."""
        depths = self.mtp_pattern if self.num_nextn_predict_layers else ""
        return frozenset(self.pattern + depths)

    @property
    def num_layers(self) -> int:
        """Layers of the model, each a norm and one mixer."""
        return len(self.pattern)

    @property
    def mamba_width(self) -> int:
        """Channels of a Mamba-2 layer's state (d_inner)."""
        return self.num_mamba_heads * self.mamba_head_dim

    @property
    def dt_limit(self) -> tuple[float, float]:
        """Lowest and highest time step, infinity for no highest."""
        low, high = self.time_step_limit
        return low, math.inf if high is None else high

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
    def from_hf(cls, config: Mapping[str, Any]) -> "HybridConfig":
        """Read ``config.json`` of a Nemotron-H or Mamba-2 model, in any of its dialects.

        Raises:
            HybridConfigError: a key is missing, or asks for what this package does not do; names
                the key and its value.
        """
        from fivefold.hybrid_ssm.hf_config import config_from_hf

        return config_from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that transformers' own class and the older remote code both load."""
        from fivefold.hybrid_ssm.hf_config import config_to_hf

        return config_to_hf(self)


def _check_sizes(config: HybridConfig, names: tuple[str, ...], letter: str) -> None:
    why = f" for the {letter!r} layers of pattern {config.pattern!r}" if letter else ""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise HybridConfigError(f"{name} is {value!r}; it must be an integer >= 1{why}")


def _check_divides(config: HybridConfig, name: str, divisor: str) -> None:
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        legal = [d for d in range(1, value + 1) if value % d == 0]
        raise HybridConfigError(
            f"{name} {value} is not a multiple of {divisor} {by}; divisors of {value}: "
            f"{', '.join(map(str, legal[:12]))}{', ...' if len(legal) > 12 else ''}"
        )


def _check_values(config: HybridConfig) -> None:
    if ATTENTION in config.kinds:
        _check_divides(config, "num_attention_heads", "num_key_value_heads")
    if MAMBA in config.kinds:
        _check_divides(config, "num_mamba_heads", "num_groups")
    if EXPERTS in config.kinds:
        _check_experts(config)
    _check_family(config)
    low, high = config.dt_limit
    ranges = (config.time_step_min, config.time_step_max), config.decay_range
    coefficients = ("initializer_range", "bias_rate", "aux_loss_coef", "z_loss_coef", "norm_eps")
    rules = {
        "time_step_limit": (0 <= low < high, "(low, high) with 0 <= low < high, or None for high"),
        "time_step_min": (0 < ranges[0][0] <= ranges[0][1], "above 0, at most time_step_max"),
        "time_step_floor": (config.time_step_floor >= 0, "at least 0"),
        "decay_range": (0 < ranges[1][0] <= ranges[1][1], "(low, high) with 0 < low <= high"),
        "num_nextn_predict_layers": (config.num_nextn_predict_layers >= 0, "at least 0"),
        **{name: (getattr(config, name) >= 0, "at least 0") for name in coefficients},
    }
    _check_rules(config, rules)
    eos = config.eos_token_id
    ids = (config.bos_token_id, config.pad_token_id, *(eos if isinstance(eos, tuple) else (eos,)))
    for token in ids:
        if token is not None and not 0 <= token < config.vocab_size:
            raise HybridConfigError(
                f"token id {token} is outside the vocabulary of {config.vocab_size}"
            )


def _check_family(config: HybridConfig) -> None:
    """A plain Mamba-2 model is only that, in transformers' class for it."""
    if config.model_type != "mamba2":
        return
    if set(config.pattern) != {MAMBA}:
        raise HybridConfigError(
            f"pattern is {config.pattern!r}; a mamba2 model has only {MAMBA!r} layers, use "
            "model_type 'nemotron_h' for others"
        )
    if config.mamba_width % config.hidden_size:
        raise HybridConfigError(
            f"num_mamba_heads * mamba_head_dim is {config.mamba_width}; in a mamba2 model it must "
            f"be a multiple of hidden_size {config.hidden_size}"
        )


def _check_experts(config: HybridConfig) -> None:
    _check_divides(config, "num_experts", "num_expert_groups")
    per_group = config.num_experts // config.num_expert_groups
    within = config.num_chosen_groups * per_group
    latent = config.latent_size
    rules = {
        "num_chosen_groups": (
            config.num_chosen_groups <= config.num_expert_groups,
            f"at most num_expert_groups {config.num_expert_groups}",
        ),
        "num_expert_groups": (
            config.num_expert_groups == 1 or per_group >= 2,
            f"1 or at most {config.num_experts // 2}: a group counts by its two best experts",
        ),
        "num_experts_per_token": (
            config.num_experts_per_token <= within,
            f"at most {within}, the experts of {config.num_chosen_groups} group(s)",
        ),
        "latent_size": (latent is None or latent >= 1, "at least 1, or None"),
        "routed_scaling_factor": (config.routed_scaling_factor > 0, "above 0"),
    }
    _check_rules(config, rules)


def _check_rules(config: HybridConfig, rules: Mapping[str, tuple[bool, str]]) -> None:
    for name, (legal, rule) in rules.items():
        if not legal:
            raise HybridConfigError(f"{name} is {getattr(config, name)!r}; it must be {rule}")
