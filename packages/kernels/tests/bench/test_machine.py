"""Names and versions."""

import functools
import os
import platform
from importlib.metadata import version

import torch

from fivefold.kernels.bench import machine


def test_cpu() -> None:
    found = machine.describe("cpu", 3)
    assert found["device"] == "cpu"
    assert found["device_name"] == found["cpu"] != ""
    assert found["threads"] == 3
    assert 1 <= found["cores"] <= os.cpu_count()


def test_versions_name_distributions() -> None:
    found = machine.versions(["pytest", "_pytest", "nothing_of_this_name"])
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["pytest"] == version("pytest")
    assert "nothing_of_this_name" not in found


def test_missing() -> None:
    assert machine.missing(["torch", "nothing_of_this_name"]) == ("nothing_of_this_name",)


def test_functions_without_code_import_nothing() -> None:
    assert machine.imported_by(functools.partial(print)) == ()
    assert machine.imported_by(len) == ()
