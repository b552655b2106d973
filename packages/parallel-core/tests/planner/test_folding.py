"""What the README says of arXiv 2504.14960: the planner's cells are those of the committed fit."""

import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fivefold.parallel_core.planner.hardware import hardware

FOLDER = Path(__file__).parents[2] / "benchmarks"
FOUND = json.loads((FOLDER / "fit_folding_times.json").read_text())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(
        "fit_folding_times", FOLDER / "fit_folding_times.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fit_folding_times", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cells(script: ModuleType) -> list[dict[str, Any]]:
    return [script.row(cell, hardware("h100")) for cell in script.cells()]


def test_the_constants_are_the_fit() -> None:
    constants = FOUND["constants"]
    assert {name: getattr(hardware("h100"), name) for name in constants} == constants
    assert constants["bandwidth_efficiency"] == hardware("a100").bandwidth_efficiency


def test_four_cells_predict_the_others(script: ModuleType, cells: list[dict[str, Any]]) -> None:
    assert sum(cell["fitted"] for cell in cells) == 4
    found = script.summary(cells)
    assert found == FOUND["predicted"]
    assert found["cells"] == 28
    assert found["mean"] < 4.2
    for cell, written in zip(cells, FOUND["cells"], strict=True):
        assert cell["estimate"] == pytest.approx(written["estimate"], abs=0.01)


def test_the_order_of_methods_is_right_in_every_column(cells: list[dict[str, Any]]) -> None:
    columns = defaultdict(list)
    for cell in cells:
        if cell["published"] is not None:
            columns[cell["model"], cell["devices"], cell["batch"]].append(cell)
    assert len(columns) == 16
    for column in columns.values():
        published = sorted(column, key=lambda cell: float(cell["published"]))
        assert published == sorted(column, key=lambda cell: float(cell["estimate"]))


def test_what_does_not_fit(cells: list[dict[str, Any]]) -> None:
    """Both runs that were out of memory; of those that ran, six would have to recompute."""
    wrong = {(c["model"], c["method"], c["devices"], c["batch"]) for c in cells if not c["fits"]}
    assert wrong == {
        ("Llama3-8x70B", "FSDP", 256, 256),
        ("Llama3-8x70B", "TP+EP+DP", 256, 256),
        ("Mixtral-8x22B-G8T8", "coupled", 128, 256),
        ("Qwen2-57B-A14B", "FSDP", 64, 256),
        ("Qwen2-57B-A14B", "FSDP+EP", 64, 256),
        ("Qwen2-57B-A14B", "FSDP+EP", 64, 1024),
        ("Qwen2-57B-A14B", "FSDP+EP", 128, 1024),
        ("Qwen2-57B-A14B", "FSDP+EP", 256, 1024),
    }
    missing = {(c["model"], c["method"]) for c in cells if c["published"] is None}
    assert missing == {("Llama3-8x70B", "FSDP"), ("Llama3-8x70B", "TP+EP+DP")}


def test_long_sequences_are_predicted_as_the_readme_says(script: ModuleType) -> None:
    assert script.long_context(hardware("h100")) == FOUND["long_context"]
