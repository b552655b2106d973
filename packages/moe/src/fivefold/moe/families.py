"""The families of models that transformers knows, and what each of them can say.

A model that its family cannot say would train here and then be lost to every other program, so its
configuration is refused at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fivefold.moe.errors import MoEConfigError

if TYPE_CHECKING:
    from fivefold.moe.config import MoEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One of transformers' model types.

    Attributes:
        architecture: its class for causal language models.
        experts: names of an expert's gate, up and down matrices in its files.
        block: the name of what holds a layer's router and experts there.
        shared: the name of the shared expert in the block; empty where there is none.
        predicts_ahead: whether its files may hold layers behind the last one, which predict more
            than the next token; they are not read, as transformers' model does not either.
        free: fields of the configuration that may be set, beyond those that all families have.
        fixed: fields that must have one value.
    """

    architecture: str
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    block: str = "mlp"
    shared: str = ""
    predicts_ahead: bool = False
    free: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    # arXiv 2401.04088
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        experts=("w1", "w3", "w2"),
        block="block_sparse_moe",
        free=("sliding_window",),
    ),
    # arXiv 2407.10671
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        shared="shared_expert",
        free=("qkv_bias", "dense_layers", "shared_intermediate_size", "router.normalize"),
        fixed={"shared_gate": True},
    ),
    # arXiv 2505.09388
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        free=("dense_layers", "sliding_window", "router.normalize"),
        fixed={"qk_norm": True},
    ),
    # arXiv 2508.06471: the router and shared expert of DeepSeek-V3 (2412.19437)
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        shared="shared_experts",
        predicts_ahead=True,
        free=(
            "qkv_bias",
            "qk_norm",
            "rotary_fraction",
            "dense_layers",
            "shared_intermediate_size",
            "router.normalize",
            "router.scale",
            "router.num_groups",
            "router.groups_per_token",
        ),
        fixed={"router.score": "sigmoid", "router.expert_bias": True},
    ),
}

_PLAIN: Mapping[str, Any] = {
    "qkv_bias": False,
    "qk_norm": False,
    "rotary_fraction": 1.0,
    "dense_layers": (),
    "shared_intermediate_size": 0,
    "shared_gate": False,
    "sliding_window": None,
    "router.score": "softmax",
    "router.normalize": True,
    "router.scale": 1.0,
    "router.num_groups": 1,
    "router.groups_per_token": 1,
    "router.expert_bias": False,
}
"""What may differ between families, at the value that all can say but for what is fixed."""


def check_family(config: "MoEConfig") -> None:
    """Check that the files of the model's family can say all of its configuration.

    Raises:
        MoEConfigError: names the value, what the family has, and the families that could.
    """
    family = FAMILIES[config.model_type]
    wanted = {key: value for key, value in _PLAIN.items() if key not in family.free}
    wanted.update(family.fixed)
    for key, value in wanted.items():
        found = _get(config, key)
        if found != value:
            others = [name for name, other in FAMILIES.items() if _allows(other, key, found)]
            raise MoEConfigError(
                f"{key} is {found!r}; a {config.model_type} model has {value!r} there"
                + (f" ({', '.join(others)} could have it)" if others else "")
            )
    _check_special(config)


def _allows(family: Family, key: str, value: Any) -> bool:
    if key in family.free:
        return True
    return bool(family.fixed.get(key, _PLAIN[key]) == value)


def _get(config: "MoEConfig", key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_special(config: "MoEConfig") -> None:
    rule = _SPECIAL.get(config.model_type)
    if rule is not None:
        rule(config)


def _check_qwen2(config: "MoEConfig") -> None:
    if not config.shared_intermediate_size:
        raise MoEConfigError(
            "shared_intermediate_size is 0; a qwen2_moe model has a shared expert, so at least 1"
        )


def _check_glm4(config: "MoEConfig") -> None:
    shared, width = config.shared_intermediate_size, config.expert_intermediate_size
    if not shared or shared % width:
        raise MoEConfigError(
            f"shared_intermediate_size is {shared}; a glm4_moe model's shared expert is a multiple "
            f"of expert_intermediate_size {width}"
        )
    if config.dense_layers != tuple(range(len(config.dense_layers))):
        raise MoEConfigError(
            f"dense_layers is {config.dense_layers!r}; those of a glm4_moe model are its first ones"
        )


_SPECIAL: Mapping[str, Callable[["MoEConfig"], None]] = {
    "qwen2_moe": _check_qwen2,
    "glm4_moe": _check_glm4,
}
