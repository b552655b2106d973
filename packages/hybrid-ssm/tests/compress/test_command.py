"""``fivefold-hybrid-ssm compress``."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.cli import main

TOML = """
[data]
source = "{text}"
cache = "{cache}"
heldout_fraction = 0.3

[importance]
layer_samples = 2
neuron_samples = 2
sequence_length = 16
batch_size = 2

[memory]
context_length = 64

[search]
least_use = 0.0
validation_sequences = 2
num_finalists = 1
widths = [16]
attention = [1]
mamba = [1]

[distill]
short_steps = 1
global_batch_size = 2
microbatch_size = 2
sequence_length = 16
"""


def test_the_command_compresses(
    make_model: Callable[..., HybridForCausalLM],
    save: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent, file = save(make_model(pattern="M-*-")), tmp_path / "compress.toml"
    file.write_text(TOML.format(text=text, cache=tmp_path / "tokens"))
    words = ["compress", "--model", str(parent), "--output", str(tmp_path / "out")]
    words += ["--config", str(file), "--set", "distill.short_steps=2"]
    assert main([*words, "--budget", "96%"]) == 0
    out = capsys.readouterr().out
    assert "importance: 4 layers scored" in out and f"wrote {tmp_path}/out/model" in out
    model = HybridForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.intermediate_size == 16
    assert main([*words, "--budget", "80%"]) == 1
    assert "another budget" in capsys.readouterr().err
    assert main([*words, "--budget", "96%", "--set", "width"]) == 1
    assert "write KEY=VALUE" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from fivefold.hybrid_ssm.cli import main; "
        "main(['compress', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "31.7GiB" in done.stdout and "80%" in done.stdout
