"""The command: what it prints, how it ends, and what Ctrl-C and torchrun do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fivefold.moe import commands
from fivefold.moe.cli import main
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.training.loop import Outcome

from .runs import ONE_RANK, TWO_RANKS, arguments, losses, records

COMMAND = [sys.executable, "-m", "fivefold.moe"]


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    """The run's model in Hugging Face form."""
    folder = finished_run.parent / "model"
    assert main(["export", "--run", str(finished_run), "--output", str(folder)]) == 0
    return folder


# ---- help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [[], ["train"], ["export"], ["generate"]], ids=str)
def test_help_needs_no_torch(verb: list[str]) -> None:
    code = f"""
import sys
from fivefold.moe.cli import main
try:
    main({[*verb, "--help"]})
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: {' '.join(['fivefold-moe', *verb])}")
    assert not done.stderr


def test_version_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status in ((["--version"], 0), ([], 2), (["train"], 2), (["fly"], 2)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == status
    assert re.match(r"fivefold-moe \d+\.\d+", capsys.readouterr().out)


# ---- all goes well -------------------------------------------------------------------------


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
    model: Path, capsys: pytest.CaptureFixture[str], finished_run: Path, tmp_path: Path
) -> None:
    words = ["generate", "--model", str(model), "--prompt", "the sun", "--max-new-tokens", "12"]
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


# ---- bad input -----------------------------------------------------------------------------


def one_line(error: str) -> str:
    """The message, which must be all there is."""
    assert "Traceback" not in error
    head, message = error.split(": error: ", 1)
    assert head == "fivefold-moe"
    assert message.endswith("\n")
    return message


@pytest.mark.parametrize(
    ("nproc", "overrides", "message"),
    [
        ("6", {}, r"world_size 6 is not a multiple of tp\*cp\*pp = 2\*1\*2 = 4 .*nearest legal"),
        ("0", {}, "world_size must be an integer of at least 1, found 0"),
        ("8", {"layout.ep": "x"}, r"layout\.ep: found 'x' \(str\), expected int\n$"),
        ("8", {"model.num_experts": "6"}, r"num_experts=6 cannot be .* ep may be 1, 2, 3, 6\n$"),
        ("8", {"training.global_batch_size": "4"}, "needs at least 2 microbatches .* found 1;"),
        ("8", {"training.speed": "4"}, "unknown key 'training.speed'; .*legal keys: steps, "),
        ("8", {"data.source": "{folder}/empty"}, "empty holds no text files"),
        ("8", {"data.source": "{folder}/nothing"}, "nothing' does not exist: give a"),
        ("8", {"data.tokenizer": "{folder}/run.toml"}, "run.toml is not a tokenizers file"),
        ("8", {"model.vocab_size": "200"}, "has 257 ids, the model's vocabulary 200:"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    nproc: str,
    overrides: dict[str, str],
    message: str,
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def launch(*arguments: object, **options: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(commands, "launch", launch)
    (run_file.parent / "empty").mkdir(exist_ok=True)
    run = tmp_path / "run"
    found = {key: value.format(folder=run_file.parent) for key, value in overrides.items()}
    words = ["train", "--config", str(run_file), "--run", str(run), "--nproc", nproc]
    assert main([*words, *arguments(found)]) == 1
    assert re.search(message, one_line(capsys.readouterr().err))
    assert not run.exists()


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.5.w3.weight"]
    save_file(tensors, folder / "model.safetensors")


def cut_the_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_tensor, r"missing: model\.layers\.1\.block_sparse_moe\.experts\.5\.w3\.weight;"),
        (cut_the_file, r"model\.safetensors.* \d+ bytes.*\d+"),
        (lambda folder: (folder / "config.json").unlink(), r"cannot read .*config\.json: No such"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer at .*tokenizer\.json"),
    ],
)
def test_a_damaged_model_is_one_line(
    damage: Callable[[Path], None],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    damage(copy)
    assert main(["generate", "--model", str(copy), "--prompt", "a"]) == 1
    assert re.search(message, one_line(capsys.readouterr().err))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--run", "no/run", "--output", "out"], "no/run is not the folder of a run"),
        (["generate", "--model", "no/model", "--prompt", "a"], "no/model"),
        (["train", "--config", "no.toml"], "cannot read config file no.toml: No such file"),
        (["train", "--config", "{run_file}", "--set", "a"], "--set 'a'; write KEY=VALUE"),
        (["generate", "--model", "{model}", "--prompt", ""], "at least 1 token"),
        (["generate", "--model", "{model}", "--prompt", "a", "--temperature", "-1"], "at least 0"),
        (["generate", "--model", "{model}", "--prompt", "a", "--top-p", "2"], r"top_p 2\.0"),
    ],
)
def test_what_is_not_there_is_one_line(
    words: list[str],
    message: str,
    run_file: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([word.format(run_file=run_file, model=model) for word in words]) == 1
    message_found = one_line(capsys.readouterr().err)
    assert re.search(message, message_found)


def test_a_missing_package_is_one_line(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ["train", "--config", str(run_file), "--run", str(tmp_path), "--tensorboard"]
    assert main([*words, *arguments(ONE_RANK)]) == 1
    assert "tensorboard is missing: pip install" in one_line(capfd.readouterr().err)


def test_debug_shows_where_it_failed(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("a file")
    words = ["train", "--config", str(run_file), "--run", str(run), *arguments(ONE_RANK)]
    assert main(words) == 1
    with pytest.raises(Exception, match=r"(?s)rank 0 of 1 failed: FileExistsError.*Traceback"):
        main([*words, "--debug"])


def test_a_mistake_of_ours_keeps_its_traceback(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("ours")

    words = ["train", "--config", str(run_file), "--run", str(tmp_path), *arguments(ONE_RANK)]
    monkeypatch.setattr(commands, "train_rank", fail)
    assert main(words) == 1
    assert re.search(r"rank 0 of 1 failed: ZeroDivisionError: ours\nTrace", capfd.readouterr().err)
    monkeypatch.setattr(commands, "describe", fail)
    with pytest.raises(ZeroDivisionError):
        main(words)


# ---- stopping and other launchers ----------------------------------------------------------


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
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)  # two strokes within 0.3 s count as one
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)

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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 130)])
def test_all_ranks_of_torchrun_end_alike(
    rank: int, finished: bool, status: int, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "under_torchrun", lambda: True)
    monkeypatch.setattr(commands, "connect", lambda: (rank, 1))
    monkeypatch.setattr(commands, "train_rank", lambda *_: Outcome(3, finished, None))
    assert main(["train", "--config", str(run_file), *arguments(ONE_RANK)]) == status


def test_nproc_is_not_for_torchrun(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "under_torchrun", lambda: True)
    assert main(["train", "--config", str(run_file), "--nproc", "2"]) == 1
    assert "torchrun has started them already: leave it out" in one_line(capsys.readouterr().err)
