"""From a run's checkpoint to a folder in Hugging Face form."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fivefold.moe import MoEForCausalLM
from fivefold.moe.export import export_run, load_run_model, read_run
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.training.tokenizer import FileTokenizer


def same(a: MoEForCausalLM, b: MoEForCausalLM) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_a_run_becomes_a_model_folder(finished_run: Path, tmp_path: Path) -> None:
    assert export_run(finished_run, tmp_path) == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("mixtral", "float32")
    assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
    assert FileTokenizer(tmp_path).encode("é").tolist() == [195, 169]
    model, step = load_run_model(finished_run)
    assert step == 6
    assert not model.training
    assert same(MoEForCausalLM.from_pretrained(tmp_path), model)


def test_weights_are_those_that_were_trained(finished_run: Path) -> None:
    first, _ = load_run_model(finished_run, 3)
    last, _ = load_run_model(finished_run)
    assert all(torch.isfinite(p).all() for p in last.parameters())
    pairs = zip(first.parameters(), last.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_another_step_dtype_and_shard_size(finished_run: Path, tmp_path: Path) -> None:
    assert export_run(finished_run, tmp_path, 3, torch.bfloat16, "40KB") == 3
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    with SafetensorsReader(tmp_path) as reader:
        assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}
    expected, _ = load_run_model(finished_run, 3, torch.bfloat16)
    assert same(MoEForCausalLM.from_pretrained(tmp_path), expected)
    rounded, _ = load_run_model(finished_run, 3)
    assert same(rounded.to(torch.bfloat16), expected)


def test_what_is_no_run(finished_run: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(CheckpointError, match=r"nothing is not the folder of a run: .* makes one"):
        read_run(missing)
    with pytest.raises(CheckpointError, match=r"no checkpoint after step 4; it has 3, 6$"):
        load_run_model(finished_run, 4)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(finished_run / "run.json", empty)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint"):
        load_run_model(empty)
    (empty / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        read_run(empty)


def test_a_damaged_checkpoint_is_passed_over(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    file = sorted((run / "checkpoints" / "step-00000006").glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert load_run_model(run)[1] == 3
    with pytest.raises(CheckpointError, match=rf"{file.name} has \d+ bytes; .* with \d+ bytes"):
        load_run_model(run, 6)
    assert Checkpoints(run / "checkpoints").steps() == [3, 6]


def test_the_tokenizer_is_the_runs_own_copy(finished_run: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "model"
    shutil.copytree(finished_run, run)
    plain = json.loads((run / "run.json").read_text())
    plain["data"]["tokenizer"] = "moved/away.json"
    (run / "run.json").write_text(json.dumps(plain))
    export_run(run, output)
    assert FileTokenizer(output).encode("é").tolist() == [195, 169]
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer"):
        export_run(run, output)
