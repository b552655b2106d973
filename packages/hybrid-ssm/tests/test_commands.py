"""What the verbs do and print."""

import re
from pathlib import Path

import pytest

from fivefold.hybrid_ssm.cli import main


def test_dry_run_trains_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "--config", str(run_file), "--run", str(run), "--nproc", "4", "--dry-run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^text +20 files: [\d,]+ tokens to train on", out, re.MULTILINE)
    assert re.search(r"^model  M-E\*M, [\d,]+ parameters$", out, re.MULTILINE)
    assert not run.exists()


def test_generate_streams_and_says_how_fast(
    exported_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(exported_run), "--prompt", "the sun"]
    words += ["--max-new-tokens", "12"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--temperature", "0"], ["--top-k", "1"]):
        assert main([*words, *more]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert re.fullmatch(
            r"read 7 tokens at [\d.]+ tokens/s, wrote \d+( at [\d.]+ tokens/s)?\n", err
        )
    assert all(text.startswith("the sun") and text.endswith("\n") for text in texts)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert main([*words[:-1], "0", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr() == ("the sun\n", "read 7 tokens, wrote none\n")


def test_generate_ends_at_a_text(exported_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(exported_run), "--prompt", "the", "--seed", "3"]
    assert main(words) == 0
    text = capsys.readouterr().out.removeprefix("the")
    stop = text[20]
    assert main([*words, "--stop", stop]) == 0
    found = capsys.readouterr().out.removeprefix("the").rstrip("\n")
    assert found == text[: text.index(stop) + 1].rstrip("\n")
