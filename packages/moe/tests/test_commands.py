"""What the verbs do and print, and what Ctrl-C and torchrun do to them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fivefold.moe import commands
from fivefold.moe.cli import main
from fivefold.parallel_core.checkpoint import Checkpoints

from .runs import ONE_RANK, TWO_RANKS, arguments, losses, records

COMMAND = [sys.executable, "-m", "fivefold.moe"]


def test_dry_run_trains_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "--config", str(run_file), "--run", str(run), "--nproc", "8", "--dry-run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "ep=4 folds tp(2) x dp(2)" in out
    assert re.search(r"^text +20 files: [\d,]+ tokens to train on", out, re.MULTILINE)
    ends, attention, router, expert, norms = 2 * 257 * 16, 3 * 16 * 16, 8 * 16, 3 * 16 * 16, 5 * 16
    total = ends + 2 * (attention + router + 8 * expert) + norms
    active = total - 2 * 6 * expert
    assert f"model  {total:,} parameters, {active:,} of them active for a token" in out
    assert not run.exists()


def test_a_run_says_where_things_are(
    run_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", str(run_file), "--run", str(tmp_path)]
    assert main([*words, *arguments(ONE_RANK | {"training.steps": "2"})]) == 0
    out, err = capfd.readouterr()
    assert f"finished 2 steps; metrics, loss curve and checkpoints are in {tmp_path}\n" in out
    assert re.search(r"step 2: [\d.]+ bits per byte on held-out text\n", err)
    assert "step 2/2 (100.0%), loss " in err


def test_export_and_generate(
    exported_run: Path, capsys: pytest.CaptureFixture[str], finished_run: Path, tmp_path: Path
) -> None:
    words = [
        "generate",
        "--model",
        str(exported_run),
        "--prompt",
        "the sun",
        "--max-new-tokens",
        "12",
    ]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--temperature", "0"], ["--top-k", "1"]):
        assert main([*words, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("the sun") and text.endswith("\n") for text in texts)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    words = ["export", "--run", str(finished_run), "--output", str(tmp_path), "--step", "3"]
    assert main([*words, "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"wrote the model after step 3 to {tmp_path}\n"


# ---- stopping, and other launchers ----------------------------------------------------------


def wait_for_steps(run: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Return when a run has measured some steps."""
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(records_so_far(run)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def records_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_ctrl_c_saves_and_the_same_command_goes_on(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "--config", str(run_file), "--run", str(run), "--nproc", "2"]
    steps = {"training.steps": "1000000", "training.checkpoint_every": "1000000"}
    process = subprocess.Popen(
        [*COMMAND, *words, *arguments(TWO_RANKS | steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_steps(run, 3, process)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the ranks as well
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "SIGINT: saving after this step (once more to stop at once)\n" in err
    assert "Traceback" not in err
    said = re.search(r"stopped after step (\d+); run the same command again to go on\n$", out)
    assert said
    step = int(said[1])
    assert Checkpoints(run / "checkpoints").steps() == [step]
    assert records(run)[-1]["step"] == step
    more = {"training.steps": str(step + 2)}
    assert main([*words, *arguments(TWO_RANKS | more)]) == 0
    measured = [record["step"] for record in records(run) if "loss" in record]
    assert measured == list(range(1, step + 3))


def test_a_second_ctrl_c_ends_at_once(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def hang(*arguments: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:  # what comes within 0.3 s of the stroke before is the same stroke
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.4)

    monkeypatch.setattr(commands, "train_rank", hang)
    words = ["train", "--config", str(run_file), "--run", str(tmp_path), *arguments(ONE_RANK)]
    assert main(words) == 130
    assert capfd.readouterr().err.endswith("fivefold-moe: interrupted\n")


def test_torchrun_goes_on_with_a_run(run_file: Path, finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words = ["train", "--config", str(run_file), "--run-folder", str(run), *arguments(TWO_RANKS)]
    done = subprocess.run(
        [*torchrun, "-m", "fivefold.moe", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on 1 node") == 1
    assert done.stdout.count("finished 6 steps") == 1
    assert losses(run) == pytest.approx(losses(finished_run), abs=1e-5, rel=0)


def test_ctrl_c_saves_under_torchrun(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # What torchrun does for one rank, without the seconds that it takes.
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    steps = {"training.steps": "1000000", "training.checkpoint_every": "1000000"}
    words = ["train", "--config", str(run_file), "--run", str(run)]
    process = subprocess.Popen(
        [*COMMAND, *words, *arguments(ONE_RANK | steps)],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_steps(run, 3, process)
        os.killpg(process.pid, signal.SIGINT)  # by the terminal,
        os.killpg(process.pid, signal.SIGINT)  # and again by torchrun
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    said = re.search(r"stopped after step (\d+); run the same command again to go on\n$", out)
    assert said
    assert Checkpoints(run / "checkpoints").steps() == [int(said[1])]


def test_a_run_that_diverges_ends_and_keeps_what_was_good(
    run_file: Path, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    words = ["train", "--config", str(run_file), "--run", str(run)]
    more = {
        "training.steps": "20",
        "training.schedule.learning_rate": "1e30",
        "training.skip_nonfinite": "0",
    }
    assert main([*words, *arguments(ONE_RANK | more)]) == 1
    error = capfd.readouterr().err
    assert re.search(r"rank 0 of 1: step \d+: the norm of the gradient is nan", error)
    assert Checkpoints(run / "checkpoints").steps() == [3, 6]
