"""The tables of a run: those of the best mapping, readable as TOML, and legal."""

import tomllib
from typing import Any

import pytest

from fivefold.parallel_core.config import replace
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.planner.auto import as_toml, best_tables, shape_of, tables
from fivefold.parallel_core.planner.memory import GIB
from fivefold.parallel_core.planner.parameters import total_parameters
from fivefold.parallel_core.planner.presets import preset
from fivefold.parallel_core.planner.setup import Setup, check

MODEL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 0,
    "expert_intermediate_size": 2048,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "shared_intermediate_size": 0,
    "dense_layers": [0],
    "intermediate_size": 4096,
    "tie_word_embeddings": False,
}


def test_the_shape_counts_the_models_parameters() -> None:
    shape = shape_of(MODEL)
    assert shape.layers == "TEEEEEEE"
    attention, norms = 2 * 1024 * 64 * (16 + 4), 2 * 1024
    experts, dense = 7 * (8 * 3 * 1024 * 2048 + 1024 * 8), 3 * 1024 * 4096
    whole = 8 * (attention + norms) + experts + dense + 2 * 4096 * 1024 + 1024
    assert total_parameters(shape) == whole


def test_mixtral_is_the_preset() -> None:
    mixtral = preset("Mixtral-8x22B")
    found = shape_of(
        MODEL
        | {"vocab_size": 32000, "hidden_size": 6144, "num_layers": 56, "num_experts": 8}
        | {"num_attention_heads": 48, "num_key_value_heads": 8, "dense_layers": []}
        | {"expert_intermediate_size": 16384, "intermediate_size": 0}
    )
    assert replace(found, name=mixtral.name, pattern=None) == mixtral


@pytest.mark.parametrize("memory", [None, 6 * GIB])
def test_the_tables_are_a_legal_mapping(memory: int | None) -> None:
    shape = shape_of(MODEL)
    found = best_tables(shape, world_size=8, length=512, global_batch=32, memory=memory)
    assert tomllib.loads(as_toml(found)) == found
    training = found["training"]
    assert training["global_batch_size"] == 32
    assert training["sequence_length"] == 512
    setup = Setup(
        world_size=8,
        length=512,
        global_batch=32,
        microbatch=training["microbatch_size"],
        recompute=training["recompute"],
        **found["layout"],
    )
    check(shape, setup)


def test_a_pipeline_has_its_table() -> None:
    piped = Setup(world_size=8, length=512, global_batch=32, pp=2)
    assert tables(piped)["training"]["pipeline"] == {"schedule": "1F1B", "stages_per_rank": 1}
    assert "pipeline" not in tables(replace(piped, pp=1))["training"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="the model has no num_experts; needed: vocab_size"):
        shape_of(MODEL | {"num_experts": 0})
    with pytest.raises(ConfigError, match=r"no mapping fits in 0\.1 GiB"):
        best_tables(shape_of(MODEL), world_size=2, length=512, global_batch=4, memory=GIB // 10)
