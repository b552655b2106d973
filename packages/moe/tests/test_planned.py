"""Runs under the planner's mapping."""

from pathlib import Path

import pytest

from fivefold.moe.cli import main
from fivefold.moe.planned import load_planned
from fivefold.moe.train import check, load_run
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.errors import ConfigError


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_mapping_can_run(run_file: Path, world_size: int) -> None:
    run, chosen = load_planned(run_file, {}, world_size, "h100")
    layout = check(run, world_size)
    assert layout.world_size == world_size
    before = load_run(run_file)
    assert run.model == before.model and run.data == before.data
    assert run.training.schedule == before.training.schedule
    assert run.training.global_batch_size == before.training.global_batch_size
    assert f"tp = {layout.tp}\n" in chosen and f"pp = {layout.pp}\n" in chosen


def test_overrides_have_the_last_word(run_file: Path) -> None:
    overrides = {"layout.ep": "2", "layout.pp": "1", "training.recompute": "none"}
    run, _ = load_planned(run_file, overrides, 8, "h100")
    assert (run.layout.ep, run.layout.pp, run.training.recompute) == (2, 1, "none")


def test_memory_of_the_users_machine_decides(run_file: Path, tmp_path: Path) -> None:
    machine = tmp_path / "small.toml"
    machine.write_text(
        'name = "small"\nmemory = 1000\nreserved = 0\nflops = 1e12\nbandwidth = 1e11\n'
        "node_bandwidth = 1e10\nnetwork_bandwidth = 1e9\n"
    )
    with pytest.raises(ConfigError, match="GiB"):
        load_planned(run_file, {}, 8, str(machine))


def test_the_command_says_what_was_chosen(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", str(run_file), "--run", str(tmp_path), "--nproc", "4"]
    assert main([*words, "--dry-run", "--plan", "auto", "--machine", "a100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the planner's choice for a100:\n\n[layout]\n")
    chosen = tmp_path / "chosen.toml"
    chosen.write_text(out.partition(":\n\n")[2].partition("4 ranks on")[0])
    tables = load_toml(chosen)
    assert tables["layout"].keys() == {"tp", "cp", "pp", "ep", "etp"}
    assert f"dp {4 // (tables['layout']['tp'] * tables['layout']['pp'])}" in " ".join(out.split())


def test_no_such_machine(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", str(run_file), "--dry-run", "--plan", "auto"]
    assert main([*words, "--machine", "z1"]) == 1
    error = "fivefold-moe: error: no machine 'z1'; legal: a100, b200, h100, h200, or a TOML file\n"
    assert capsys.readouterr().err == error
