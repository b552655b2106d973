"""The arguments that commands share."""

import subprocess
import sys
from argparse import ArgumentParser

import pytest

from fivefold.parallel_core.arguments import (
    add_debug,
    add_export,
    add_generate,
    add_overrides,
    check_temperature,
    command_parser,
    overrides_of,
)
from fivefold.parallel_core.errors import ConfigError


def test_nothing_here_needs_torch() -> None:
    code = """
import sys
import fivefold.parallel_core.arguments
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_has_verbs_a_version_and_debug(capsys: pytest.CaptureFixture[str]) -> None:
    parser, verbs = command_parser("fivefold-parallel-core", "does things")
    add_export(verbs.add_parser("export"))
    add_debug(verbs.choices.values())
    options = parser.parse_args(["export", "--run", "a", "--output", "b", "--debug"])
    assert (options.command, options.run, options.output, options.debug) == ("export", "a", "b", 1)
    assert (options.step, options.dtype, options.max_shard_size) == (None, None, "5GB")
    for words, status in (["--version"], 0), ([], 2), (["export"], 2):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        assert end.value.code == status
    assert capsys.readouterr().out.startswith("fivefold-parallel-core 0.")


def test_how_tokens_are_drawn() -> None:
    parser = ArgumentParser()
    add_generate(parser, model="a model")
    words = ["--model", "m", "--prompt", "p"]
    options = parser.parse_args([*words, "--top-p", "0.9"])
    assert (options.temperature, options.top_k, options.top_p, options.seed) == (0.8, None, 0.9, 0)
    check_temperature(0.0)
    with pytest.raises(ConfigError, match=r"--temperature -0\.5: it must be at least 0"):
        check_temperature(-0.5)


def test_overrides() -> None:
    parser = ArgumentParser()
    add_overrides(parser)
    pairs = parser.parse_args(["--set", "a.b=1", "--set", "c=x=y"]).overrides
    assert overrides_of(pairs) == {"a.b": "1", "c": "x=y"}
    for wrong in ("a", "=1"):
        with pytest.raises(ConfigError, match=r"write KEY=VALUE, e\.g\. --set training\.steps=100"):
            overrides_of([wrong])
