"""The best mapping as the tables of a run's TOML file, for a model of this project's packages."""

from collections.abc import Mapping
from dataclasses import replace as with_fields
from typing import Any

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.hardware import Hardware, hardware
from fivefold.parallel_core.planner.jobs import Job
from fivefold.parallel_core.planner.models import Experts, ModelShape
from fivefold.parallel_core.planner.nearest import DEGREES
from fivefold.parallel_core.planner.search import search
from fivefold.parallel_core.planner.setup import Setup

Tables = dict[str, Any]


def shape_of(model: Mapping[str, Any]) -> ModelShape:
    """What a mixture-of-experts decoder's configuration, as plain data, is to the planner.

    Args:
        model: ``MoEConfig.to_dict()`` of fivefold-moe, or the "model" table of a run.

    Raises:
        ConfigError: a size is missing.
    """
    missing = [name for name in _NEEDED if not model.get(name)]
    if missing:
        raise ConfigError(f"the model has no {', '.join(missing)}; needed: {', '.join(_NEEDED)}")
    router, capacity = model.get("router") or {}, model.get("capacity") or {}
    layers, dense = model["num_layers"], set(model.get("dense_layers") or ())
    return ModelShape(
        name=model.get("model_type", "model"),
        hidden=model["hidden_size"],
        num_layers=layers,
        num_heads=model["num_attention_heads"],
        num_kv_heads=model.get("num_key_value_heads") or None,
        head_dim=model.get("head_dim") or None,
        vocabulary=model["vocab_size"],
        ffn=model.get("intermediate_size") or None,
        gated=True,
        qkv_bias=bool(model.get("qkv_bias")),
        qk_norm=bool(model.get("qk_norm")),
        tied=bool(model.get("tie_word_embeddings")),
        pattern="".join("T" if index in dense else "E" for index in range(layers)),
        experts=Experts(
            num_experts=model["num_experts"],
            top_k=model["num_experts_per_token"],
            ffn=model["expert_intermediate_size"],
            shared_ffn=model.get("shared_intermediate_size") or 0,
            shared_gate=bool(model.get("shared_gate")),
            score=router.get("score", "softmax"),
            normalize=router.get("normalize", True),
            capacity=capacity.get("factor") if capacity.get("pad") else None,
        ),
    )


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_token",
    "expert_intermediate_size",
)


def best_tables(
    model: ModelShape,
    *,
    world_size: int,
    length: int,
    global_batch: int,
    memory: int | None = None,
    machine: Hardware | None = None,
) -> Tables:
    """The tables "layout" and "training" of a run under the fastest mapping that fits.

    Args:
        model: the model.
        world_size: number of ranks.
        length: tokens of a sequence.
        global_batch: sequences in a step.
        memory: bytes of one device that the run may take; None is what the machine leaves.
        machine: None is an H100.

    Raises:
        ConfigError: no mapping is legal, or none fits; the message has the nearest.
    """
    machine = machine or hardware("h100")
    if memory is not None:
        machine = Hardware.from_dict(machine.to_dict() | {"memory": memory, "reserved": 0})
    job = Job(model=model, world_size=world_size, length=length, global_batch=global_batch)
    return tables(search(with_fields(job, forms=("zero1", "zero3")), machine).plans[0].setup)


def tables(setup: Setup) -> Tables:
    """A mapping as tables of a run; the pipeline's where there is one."""
    pipeline = {
        "schedule": setup.pipeline.schedule,
        "stages_per_rank": setup.pipeline.stages_per_rank,
    }
    training = {
        "global_batch_size": setup.global_batch,
        "microbatch_size": setup.microbatch,
        "sequence_length": setup.length,
        "recompute": setup.recompute,
        "data_parallel": {"form": setup.data.form},
    }
    layout = {axis: getattr(setup, axis) for axis in DEGREES}
    return {
        "layout": layout,
        "training": training | ({"pipeline": pipeline} if setup.pp > 1 else {}),
    }


def as_toml(found: Tables, name: str = "") -> str:
    """Tables of strings, numbers and tables as TOML."""
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name and plain else []
    lines += [
        f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
        for key, value in plain.items()
    ]
    parts = ["\n".join(lines)] if lines else []
    for key, value in found.items():
        if isinstance(value, dict):
            parts.append(as_toml(value, f"{name}.{key}" if name else key))
    return "\n\n".join(parts)
