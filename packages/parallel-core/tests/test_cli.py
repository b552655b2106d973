"""The command line: help without torch, statuses, and what is wrong said in one line."""

import json
import re
import subprocess
import sys

import pytest

from fivefold.parallel_core.cli import main
from fivefold.parallel_core.doctor import command
from fivefold.parallel_core.env import environment, table


@pytest.mark.parametrize("words", [["--help"], ["env", "--help"], ["doctor", "-h"], ["--version"]])
def test_help_needs_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from fivefold.parallel_core.cli import main
try:
    main({words})
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    start = "fivefold-parallel-core " if words == ["--version"] else "usage: fivefold-parallel-core"
    assert done.stdout.startswith(start)
    assert not done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"fivefold-parallel-core \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["doctor", "--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["doctor", "--bytes", "0"], "argument --bytes: '0' is not above 0"),
        (["doctor", "--bytes", "1MB"], "argument --bytes: invalid int value: '1MB'"),
        (["doctor", "--repeats", "-1"], "argument --repeats: '-1' is not above 0"),
        (["doctor", "--timeout", "nan"], "argument --timeout: 'nan' is not above 0"),
        (["doctor", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["env", "--nproc", "2"], "unrecognized arguments: --nproc 2"),
    ],
)
def test_a_wrong_command_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--nproc", "6", "--tp", "4"], "world_size 6 is not a multiple of tp*cp*pp = 4*1*1 = 4"),
        (["--nproc", "0"], "world_size must be an integer of at least 1, found 0"),
        (["--tp", "0"], "tp must be an integer of at least 1, found 0"),
        (["--order", "tp-xp"], "order 'tp-xp' names 'xp', which is not an axis"),
        (["--cp", "2", "--ep", "4", "--pp", "2", "--order", "cp-pp-ep-dp"], "the same pipeline"),
    ],
)
def test_an_illegal_layout_explains_itself(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("fivefold-parallel-core: error: Layout(")
    assert reason in error and "legal" in error and "Traceback" not in error


def test_what_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--device", "cuda"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"fivefold-parallel-core: error: --device cuda needs torchrun.*\n", error)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--nproc", "2"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"fivefold-parallel-core: error: --nproc forks ranks, but .*\n", error)


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "launch", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "fivefold-parallel-core: interrupted\n"


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert capsys.readouterr().out == table(environment()) + "\n"
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == environment()


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "fivefold.parallel_core", "doctor", "--tp", "3", "--nproc", "4"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "world_size 4 is not a multiple of tp*cp*pp = 3*1*1 = 3" in done.stderr
