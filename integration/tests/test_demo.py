"""The demo, small: to the end, and stopped and gone on with."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fivefold.integration.demo import main
from fivefold.moe import MoEForCausalLM
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.training.loop import Trainer

SMALL = {
    "model.hidden_size": "32",
    "model.num_layers": "2",
    "model.expert_intermediate_size": "32",
    "training.steps": "4",
    "training.schedule.warmup_steps": "1",
    "training.global_batch_size": "8",
    "training.microbatch_size": "2",
    "training.sequence_length": "32",
    "training.evaluation_sequences": "8",
}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command line of a small demo on a small text."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.py").write_text(f"VALUE_{number} = {number}\n" * 20)
    values = SMALL | {"data.source": f"{tmp_path}/text", "data.cache": f"{tmp_path}/tokens"}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return ["--run", str(tmp_path / "run"), *words]


def test_demo(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second step, then the same command again."""
    train_step = Trainer.train_step

    def interrupt(trainer: Trainer) -> bool:
        if (trainer.topology.world_rank, trainer.step) == (0, 1):
            os.kill(os.getppid(), signal.SIGINT)
            while not trainer._stop:  # until the launcher has passed it on
                time.sleep(0.01)
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        assert main(arguments) == 130
    out, err = capfd.readouterr()
    assert out.endswith("stopped after step 2; run the same command again to go on\n")
    assert "SIGINT: saving after this step" in err
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2]

    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert "going on after step 2\n" in err
    assert re.search(r"^attention +size.* \| experts +size", out, re.MULTILINE)
    assert "ep=4 folds tp(2) x dp(2)\n" in out
    assert "finished 4 steps;" in out
    bits = re.search(r"held-out text, which training never saw: ([\d.]+) bits a token", out)
    assert bits
    assert 5 < float(bits[1]) < 8.1
    found = re.search(r"largest logit difference to transformers: (\S+) \(passes 0.0001\)\n", out)
    assert found
    assert float(found[1]) <= 1e-4
    assert re.search(r"\nsample, [^\n]*:\n\nclass Reader:", out)
    check_the_model(tmp_path / "run" / "model", tmp_path)


def check_the_model(folder: Path, tmp_path: Path) -> None:
    """What was trained on eight ranks goes through transformers and back without a changed bit."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("é").input_ids == [195, 169]
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = map(MoEForCausalLM.from_pretrained, (folder, tmp_path / "theirs"))
    assert all(map(torch.equal, ours.parameters(), again.parameters()))


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc", "8", "--set", "layout.ep=3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("demo: error: ")
    assert "Traceback" not in error
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--set KEY=VALUE" in capsys.readouterr().out
