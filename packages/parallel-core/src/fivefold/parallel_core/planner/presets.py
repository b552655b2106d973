"""Models of the papers, by name (arXiv 2205.05198 table 3; arXiv 2504.14960 section 4.1)."""

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.models import Experts, ModelShape


def _gpt(name: str, num_heads: int, hidden: int, num_layers: int) -> ModelShape:
    return ModelShape(
        name=name,
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        vocabulary=51200,
        bias=True,
        norm_vectors=2,
        dropout=True,
        fused_attention=False,
        tied=True,
        positions=2048,
    )


_MIXTRAL = ModelShape(
    name="Mixtral-8x22B",
    hidden=6144,
    num_layers=56,
    num_heads=48,
    num_kv_heads=8,
    vocabulary=32000,
    gated=True,
    experts=Experts(num_experts=8, top_k=2, ffn=16384),
)
_MODELS = (
    _gpt("22B", 64, 6144, 48),
    _gpt("175B", 96, 12288, 96),
    _gpt("530B", 128, 20480, 105),
    _gpt("1T", 160, 25600, 128),
    _MIXTRAL,
    replace(
        _MIXTRAL,
        name="Mixtral-8x22B-G8T8",
        experts=Experts(num_experts=64, top_k=8, ffn=2048),
    ),
    ModelShape(
        name="Qwen2-57B-A14B",
        hidden=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vocabulary=151936,
        gated=True,
        experts=Experts(num_experts=64, top_k=8, ffn=2560, shared_ffn=20480),
    ),
    ModelShape(
        name="Llama3-8x70B",
        hidden=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        vocabulary=128256,
        gated=True,
        experts=Experts(num_experts=8, top_k=2, ffn=28672),
    ),
)
PRESETS = {model.name: model for model in _MODELS}


def preset(name: str) -> ModelShape:
    """The model of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model {name!r}; legal: {', '.join(PRESETS)}, or a TOML file")
    return PRESETS[name]
