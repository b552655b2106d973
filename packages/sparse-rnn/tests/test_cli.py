"""The command, as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from fivefold.sparse_rnn import SparseLSTM, SparseRNN
from fivefold.sparse_rnn.cli import main


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom fivefold.sparse_rnn.cli import _parser\n_parser().format_help()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_prune_then_export_then_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict(
        {"encoder": nn.LSTM(6, 32, 2, bidirectional=True), "head": nn.Linear(2, 2)}
    )
    torch.save(model.state_dict(), tmp_path / "model.pt")
    pruned = tmp_path / "pruned.safetensors"
    assert main(["prune", str(tmp_path / "model.pt"), str(pruned), "--density", "0.1"]) == 0
    assert "encoder.weight_hh_l1_reverse: kept 10.0% of 4096" in capsys.readouterr().out
    state = load_file(pruned)
    assert state.keys() == model.state_dict().keys()
    assert main(["export", str(pruned), str(tmp_path / "out")]) == 0
    layer = SparseLSTM.from_pretrained(tmp_path / "out" / "encoder")
    assert layer.density == pytest.approx(0.1, abs=0.001) and layer.num_layers == 2
    model.load_state_dict(state)
    x = torch.randn(4, 2, 6)
    torch.testing.assert_close(layer(x)[0], model["encoder"](x)[0])


@pytest.mark.parametrize(
    ("options", "each"),
    [(["--pattern", "balanced"], 3), (["--pattern", "2:4"], 16), (["--scope", "global"], None)],
)
def test_prune_has_patterns_and_scopes(
    options: list[str], each: int | None, tmp_path: Path
) -> None:
    torch.save(nn.GRU(4, 32).state_dict(), tmp_path / "a.pt")
    output = str(tmp_path / "b.safetensors")
    assert main(["prune", str(tmp_path / "a.pt"), output, "--density", "0.1", *options]) == 0
    mask = load_file(output)["weight_hh_l0"] != 0
    if each is not None:
        assert bool((mask.sum(1) == each).all())


def test_export_follows_masks_and_takes_a_cell(tmp_path: Path) -> None:
    layer = nn.RNN(4, 16, nonlinearity="relu", bias=False)
    prune.random_unstructured(layer, "weight_hh_l0", 0.75)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    arguments = ["export", str(tmp_path / "a.pt"), str(tmp_path)]
    assert main(arguments) == 1
    assert main([*arguments, "--cell", "RNN_RELU"]) == 0
    found = SparseRNN.from_pretrained(tmp_path / "layer")
    assert found.density == 0.25
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(found(x)[0], layer(x)[0])


@pytest.mark.parametrize("train", [[], ["--train"]])
def test_bench_prints_both(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", "32", "--steps", "3", "--rounds", "1", "--threads", "1"]
    assert main(["bench", *small, *train]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown and "sparse" in shown and "times as fast, 1 threads" in shown


def test_plan_tells_where_nonzeros_lie(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", "--hidden", "256", "--batch", "4", "--values", "bfloat16"]
    assert main(small) == 0
    shown = capsys.readouterr().out
    assert "lstm of 256 units, 26" in shown and "cuda, nonzeros in registers" in shown
    assert main([*small, "--backward", "--cell", "GRU", "--device", "a100"]) == 0
    assert "backward, A100" in capsys.readouterr().out
    assert main([*small, "--device", "tpu"]) == 1
    assert "devices are a100, h100, h200, b200, found 'tpu'" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none.pt"), str(tmp_path)]) == 1
    assert "cannot read" in capsys.readouterr().err
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    assert main(["export", str(tmp_path / "a.pt"), str(tmp_path)]) == 1
    assert "holds no weight_hh_l*" in capsys.readouterr().err
