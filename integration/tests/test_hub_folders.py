"""Folders of safetensors between fivefold.parallel_core.hub and transformers, both ways."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fivefold.parallel_core.hub import SafetensorsReader, write_sharded


def tiny() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )


@pytest.mark.parametrize("theirs", ["5GB", "15KB"])
@pytest.mark.parametrize("ours", ["5GB", "20KB"])
def test_transformers_reads_what_we_write_of_what_we_read(
    tmp_path: Path, theirs: str, ours: str
) -> None:
    model = MixtralForCausalLM(tiny())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=theirs)
    with SafetensorsReader(tmp_path / "theirs") as reader:
        plan = [(name, reader.shape(name), reader.dtype(name)) for name in reader.names()]
        tensors = ((name, reader.read(name)) for name in reader.names())
        paths = write_sharded(tmp_path / "ours", plan, tensors, ours)
    assert (len(paths) > 1) == (ours == "20KB")
    tiny().save_pretrained(tmp_path / "ours")
    again, report = MixtralForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(again.state_dict()[name], expected[name]) for name in expected)
