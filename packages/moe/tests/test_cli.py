"""The command line: help without torch, and what is wrong said in one line."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fivefold.moe import commands
from fivefold.moe.cli import main
from fivefold.parallel_core.training import command

from .runs import ONE_RANK, arguments

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

    monkeypatch.setattr(command, "launch", launch)
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
    exported_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(exported_run, tmp_path / "model"))
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
    exported_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([word.format(run_file=run_file, model=exported_run) for word in words]) == 1
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
