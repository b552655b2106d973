"""Memory in bits a value: the paper's arithmetic, and terms by hand."""

import pytest

from fivefold.hybrid_ssm import HybridConfig
from fivefold.hybrid_ssm.compress.config import MemoryConfig
from fivefold.hybrid_ssm.compress.memory import (
    kv_elements,
    memory_of,
    parse_budget,
    shown,
    state_elements,
)
from fivefold.hybrid_ssm.errors import HybridConfigError

from ..released import RELEASED

H_47B, H_56B = (HybridConfig.from_hf(RELEASED[f"Nemotron-H-{size}"][0]) for size in ("47B", "56B"))
GIB = 2**30
BUDGET = 31.7 * GIB


def test_the_parent_of_the_paper() -> None:
    need = memory_of(H_56B, MemoryConfig())
    assert (need.weights + need.embeddings) * 8 / 4.5 == 56_324_350_464
    assert round((need.weights + need.embeddings) / GIB, 2) == 29.51
    assert kv_elements(H_56B) == 20_480
    # With a million tokens of context it does not fit, which is why the paper prunes it.
    assert need.total > BUDGET


def test_the_child_of_the_paper_fits_where_keys_and_values_have_4_bits() -> None:
    need = memory_of(H_47B, MemoryConfig())
    assert round((need.weights + need.embeddings) / GIB, 2) == 24.51
    assert kv_elements(H_47B) == 10_240 and round(need.keys_values / GIB, 2) == 5.36
    assert state_elements(H_47B) == 45 * (256 * 64 * 256 + (256 * 64 + 2 * 8 * 256) * 3)
    assert need.total <= BUDGET
    eight = memory_of(H_47B, MemoryConfig(kv_bits=8))
    assert round(eight.keys_values / GIB, 2) == 9.54 and eight.total > BUDGET


def test_terms_by_hand() -> None:
    config = HybridConfig(
        vocab_size=10, hidden_size=4, pattern="M*-", num_mamba_heads=2, mamba_head_dim=4,
        state_size=3, num_groups=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=6,
    )  # fmt: skip
    memory = MemoryConfig(
        weight_bits=8, embedding_bits=16, kv_bits=4, state_bits=32, context_length=100,
        batch_size=3, workspace_bytes=7,
    )  # fmt: skip
    need = memory_of(config, memory)
    assert need.embeddings == 2 * 10 * 4 * 2
    mamba = 4 * (2 * 8 + 2 * 6 + 2) + 20 * 4 + 20 + 3 * 2 + 8 + 8 * 4 + 4
    attention = 4 * (4 + 2 + 2) + 4 * 4 + 4
    assert need.weights == mamba + attention + 2 * 4 * 6 + 4 + 4
    assert need.keys_values == 3 * 100 * (2 * 1 * 2) * 0.5
    assert need.states == 3 * (2 * 4 * 3 + 20 * 3) * 4
    assert need.total == sum((need.weights, need.embeddings, need.keys_values, need.states, 7))


@pytest.mark.parametrize("model_type", ["nemotron_h", "mamba2"])
def test_a_tied_embedding_counts_once(model_type: str) -> None:
    sizes = {
        "model_type": model_type, "vocab_size": 10, "hidden_size": 4, "pattern": "M",
        "num_mamba_heads": 2, "mamba_head_dim": 4, "state_size": 3, "num_groups": 1,
    }  # fmt: skip
    memory = MemoryConfig(weight_bits=8, context_length=0)
    tied = memory_of(HybridConfig(**sizes, tie_word_embeddings=True), memory)
    apart = memory_of(HybridConfig(**sizes), memory)
    assert (tied.embeddings, apart.embeddings) == (40, 80) and tied.weights == apart.weights


def test_budgets() -> None:
    assert parse_budget("31.7GiB", 1) == 31.7 * GIB
    assert parse_budget(" 60 %", 50) == 30
    assert parse_budget("2kb", 1) == 2000
    for wrong in ("", "31.7", "0GiB", "-3GB", "3 pounds", "GiB"):
        with pytest.raises(
            HybridConfigError, match=r"budget is .*write a number above 0 and a uni"
        ):
            parse_budget(wrong, 1)
    assert (shown(29.51 * GIB), shown(12), shown(2048)) == ("29.51 GiB", "12.00 B", "2.00 KiB")


def test_what_is_no_memory() -> None:
    with pytest.raises(HybridConfigError, match=r"kv_bits is 0; it must be at least 0\.5"):
        MemoryConfig(kv_bits=0)
