"""What is said of the machine is what Python, torch and the system say."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fivefold.parallel_core import env
from fivefold.parallel_core.env import environment, memory, packages, table


def test_what_is_installed_is_listed() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["packages"]["fivefold-parallel-core"] == version("fivefold-parallel-core")
    assert found["packages"] == packages()
    assert all(version(name) == number for name, number in packages().items())
    assert found["backends"] == {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
    }
    assert (found["nccl"] is not None) == dist.is_nccl_available()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert not dist.is_initialized()


def test_only_our_packages_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str):
            self.name, self.version = name, f"1.{len(name)}"

    names = ["numpy", "fivefold-zeta", "fivefold-alpha", "twofold-x"]
    monkeypatch.setattr(env, "distributions", lambda: map(Distribution, names))
    assert list(packages().items()) == [("fivefold-alpha", "1.14"), ("fivefold-zeta", "1.13")]


def test_what_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert env._version("fivefold-no-such-package") is None
    found = environment() | {"triton": None, "cuda": None}
    assert found["nccl"] is None and found["gpus"] == []
    facts = dict(line.split(maxsplit=1) for line in table(found).splitlines())
    assert facts["nccl"] == facts["triton"] == facts["cuda"] == facts["gpu"] == "none"
    assert "backend nccl   " in table(found) and "not in this torch" in table(found)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Some GPU", 3 << 29, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = environment()
    assert found["gpus"] == [{"name": "Some GPU", "memory": 3 << 29, "capability": "9.0"}] * 2
    assert table(found).count("Some GPU, 1.5 GiB, sm 9.0") == 2


def test_variables_of_the_rank_are_those_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert environment()["variables"] == {}
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = environment()
    assert found["variables"] == {"RANK": "3", "GLOO_SOCKET_IFNAME": "lo"}
    assert table(found).splitlines()[-2].split() == ["RANK", "3"]


def test_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text("4096\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(env, "_CGROUP_LIMITS", (str(unlimited), str(tmp_path / "missing")))
    assert memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(env, "_CGROUP_LIMITS", (str(unlimited), str(limit)))
    assert memory() == 4096

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert memory() is None
    assert "memory unknown" in table(environment())


def test_it_is_plain_data() -> None:
    assert json.loads(json.dumps(environment())) == environment()
