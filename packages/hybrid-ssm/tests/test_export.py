"""From a run's checkpoint to a folder that transformers loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.export import export_run, load_run_model, read_run
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.training.tokenizer import FileTokenizer

from .oracles import disarm


def test_a_run_becomes_a_model_folder(finished_run: Path, exported_run: Path) -> None:
    config = json.loads((exported_run / "config.json").read_text())
    assert (config["model_type"], config["hybrid_override_pattern"]) == ("nemotron_h", "M-E*M")
    assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
    assert FileTokenizer(exported_run).encode("é").tolist() == [195, 169]
    model, step = load_run_model(finished_run)
    assert step == 6 and not model.training
    again = HybridForCausalLM.from_pretrained(exported_run)
    bias = again.get_buffer("layers.2.mixer.router.bias")
    # Six steps of 0.001 up or down, or of nothing where an expert had its share.
    steps = bias.double() / read_run(finished_run).model.bias_rate
    assert steps.abs().max() >= 1 and (steps - steps.round()).abs().max() < 1e-3
    pairs = zip(again.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)
    theirs = AutoModelForCausalLM.from_pretrained(exported_run)
    disarm(theirs, model.config)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=2e-5)


def test_another_step_dtype_and_shard_size(finished_run: Path, tmp_path: Path) -> None:
    assert export_run(finished_run, tmp_path, 3, torch.bfloat16, "10KB") == 3
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    with SafetensorsReader(tmp_path) as reader:
        wide = {name for name in reader.names() if reader.dtype(name) == torch.float32}
    assert {name.rpartition(".")[2] for name in wide} == {
        "A_log",
        "D",
        "dt_bias",
        "e_score_correction_bias",
    }


def test_what_is_no_run(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is not the folder of a run: .* makes one"):
        read_run(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint after step 4; it has 3, 6$"):
        load_run_model(finished_run, 4)
    shutil.copy(finished_run / "run.json", tmp_path)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_run_model(tmp_path)
