"""The command: its table, its JSON, its errors in one line, and that it imports no torch."""

import json
import subprocess
import sys
import tomllib

import pytest

from fivefold.parallel_core.planner.cli import main

WORDS = ["22B", "--devices", "8", "--batch", "8", "--length", "2048", "--hardware", "a100"]


def test_a_plan_needs_no_torch() -> None:
    code = f"""
import sys
import tomllib
from fivefold.parallel_core.planner.cli import main
assert main({WORDS}) == 0
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("22B on 8 x A100-80GB: ")
    assert "dense.optimizer" in done.stdout
    assert "Times and MFU are estimates" in done.stdout


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 2
    for plan in found["plans"]:
        assert plan["memory"]["total"] == sum(plan["memory"]["terms"].values()) < 76 * 2**30
        setup = plan["setup"]
        assert 8 % (setup["tp"] * setup["cp"] * setup["pp"]) == 0
    times = [plan["time"]["total"] for plan in found["plans"]]
    assert times == sorted(times)


def test_toml_of_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--toml", "--tp", "4"]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    assert found["layout"]["tp"] == 4
    assert found["training"]["data_parallel"] == {"form": "zero1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["3B", "--devices", "8", "--batch", "8"], "no model '3B'; legal: 22B"),
        (["1T", "--devices", "8", "--batch", "8"], "no mapping fits in 76.0 GiB; the nearest"),
        ([*WORDS[:-1], "abacus"], "no machine 'abacus'; legal: a100"),
    ],
)
def test_errors_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
