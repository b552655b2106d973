"""The script that draws the file."""

import importlib.util
from pathlib import Path

import pytest

from fivefold.kernels.bench import record

from .test_record import a_case

PATH = Path(__file__).parents[2] / "benchmarks" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content() -> dict:
    machine = {"device": "cpu", "device_name": "A CPU", "threads": 1}
    return {
        "schema": record.SCHEMA,
        "machine": machine,
        "versions": {"torch": "3"},
        "cases": [record.as_json(a_case())],
    }


def test_ratios_are_of_the_clock(plot) -> None:
    label = "double 4x3\nfloat32 forward"
    assert plot.ratios(content()) == [(label, {"eager": 1.5})]
    assert plot.ratios(content(), "wall") == [(label, {"eager": 2.5})]
    assert plot.ratios(content(), "graph") == [(label, {"eager": 1.5})]


def test_what_cannot_be_drawn(plot) -> None:
    with pytest.raises(ValueError, match="drawn is schema 1, the file has 7"):
        plot.ratios(content() | {"schema": 7})
    with pytest.raises(ValueError, match="no case"):
        plot.ratios(content() | {"cases": []})


def test_same_figures_same_file(plot, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    first, second, bitmap = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    for path in (first, second, bitmap):
        plot.draw(content(), path)
    assert first.read_bytes() == second.read_bytes()
    assert b"<svg" in first.read_bytes()
    assert bitmap.read_bytes().startswith(b"\x89PNG")
