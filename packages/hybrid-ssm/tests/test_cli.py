"""The command line: help without torch, and what is wrong said in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.hybrid_ssm.cli import main
from fivefold.parallel_core.training import command

from .runs import arguments


@pytest.mark.parametrize("verb", [[], ["train"], ["export"], ["generate"]], ids=str)
def test_help_needs_no_torch(verb: list[str]) -> None:
    code = f"""
import sys
from fivefold.hybrid_ssm.cli import main
try:
    main({[*verb, "--help"]})
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: {' '.join(['fivefold-hybrid-ssm', *verb])}")
    assert not done.stderr


def test_version_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status in ((["--version"], 0), ([], 2), (["train"], 2), (["fly"], 2)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == status
    assert re.match(r"fivefold-hybrid-ssm \d+\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "no.toml"], "cannot read config file no.toml: No such file"),
        (["train", "--config", "{run_file}", "--set", "a"], "--set 'a'; write KEY=VALUE"),
        (["train", "--config", "{run_file}", "--nproc", "3"], "world_size 3 is not a multiple"),
        (
            ["train", "--config", "{run_file}", "--nproc", "16", *arguments({"layout.tp": "8"})],
            "cannot be split over tp=8; tp may be",
        ),
        (
            ["train", "--config", "{run_file}", *arguments({"model.pattern": "MX"})],
            "layer 1 of pattern 'MX' is 'X'",
        ),
        (["export", "--run", "no/run", "--output", "out"], "no/run is not the folder of a run"),
        (["generate", "--model", "no/model", "--prompt", "a"], "no/model"),
        (["generate", "--model", "{model}", "--prompt", ""], "at least 1 token"),
        (["generate", "--model", "{model}", "--prompt", "a", "--temperature", "-1"], "at least 0"),
        (["generate", "--model", "{model}", "--prompt", "a", "--top-p", "2"], r"top_p is 2\.0"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--prefill-chunk-size", "0"],
            "prefill_chunk_size is 0",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str],
    message: str,
    run_file: Path,
    exported_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def launch(*arguments: object, **options: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(command, "launch", launch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([word.format(run_file=run_file, model=exported_run) for word in words]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    head, found = error.split(": error: ", 1)
    assert head == "fivefold-hybrid-ssm"
    assert re.search(message, found)
