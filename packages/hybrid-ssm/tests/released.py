"""Configurations of released models, as their repositories have them, and their exact sizes."""

from typing import Any

_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_H_56B = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
_H_47B = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
    "M-M-M-M-M-"
)
_NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NANO_12B = "M-M-M-M*-" * 6 + "M-M-M-M-"
_NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
_NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
_COMMON = {"model_type": "nemotron_h", "vocab_size": 131072, "n_groups": 8, "conv_kernel": 4}
_NANO_3 = {
    **_COMMON,
    "hidden_size": 2688,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": _NANO_30B,
    "intermediate_size": 1856,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "expand": 2,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "time_step_limit": [0.0, float("inf")],
}

RELEASED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Nemotron-H-8B": (
        {
            **_COMMON,
            "hidden_size": 4096,
            "hybrid_override_pattern": _H_8B,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "attention_head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
        },
        311,
        8_100_852_736,
    ),
    "Nemotron-H-47B": (
        {
            **_COMMON,
            "hidden_size": 8192,
            "hybrid_override_pattern": _H_47B,
            "intermediate_size": 30720,
            "num_attention_heads": 64,
            "attention_head_dim": 128,
            "mamba_num_heads": 256,
            "ssm_state_size": 256,
        },
        577,
        46_791_554_816,
    ),
    "Nemotron-H-56B": (
        {
            **_COMMON,
            "hidden_size": 8192,
            "hybrid_override_pattern": _H_56B,
            "intermediate_size": 32768,
            "num_attention_heads": 64,
            "attention_head_dim": 128,
            "mamba_num_heads": 256,
            "ssm_state_size": 256,
        },
        701,
        56_324_350_464,
    ),
    "Nano-9B-v2": (
        {
            **_COMMON,
            "hidden_size": 4480,
            "hybrid_override_pattern": _NANO_9B,
            "intermediate_size": 15680,
            "num_attention_heads": 40,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 80,
            "expand": 2,
        },
        341,
        8_888_227_328,
    ),
    "Nano-12B-v2": (
        {
            **_COMMON,
            "hidden_size": 5120,
            "hybrid_override_pattern": _NANO_12B,
            "intermediate_size": 20480,
            "num_attention_heads": 40,
            "mamba_num_heads": 128,
            "mamba_head_dim": 80,
        },
        369,
        12_310_001_152,
    ),
    "3-Nano-4B": (
        {
            **_COMMON,
            "hidden_size": 3136,
            "hybrid_override_pattern": _NANO_4B,
            "intermediate_size": 12544,
            "num_attention_heads": 40,
            "mamba_num_heads": 96,
            "mamba_head_dim": 80,
            "chunk_size": 256,
        },
        263,
        3_973_556_832,
    ),
    "3-Nano-30B-A3B": (_NANO_3, 6_243, 31_577_940_288),
    "3.5-Lightning-30B-A3B": (
        {**_NANO_3, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
        6_513,
        32_913_266_240,
    ),
}

SUPER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 4096,
    "hybrid_override_pattern": _SUPER,
    "num_hidden_layers": 88,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "routed_scaling_factor": 5.0,
    "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024,
}
