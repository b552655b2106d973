"""Plans that the planner's search returns run, and keep and send what it says: all is equal.

Toy decoders with experts, whose routing is even because every expert is padded to its capacity.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("planned_runs", FOLDER / "planned_runs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planned_runs", module)
    spec.loader.exec_module(module)
    return module


def test_plans_run_and_keep_and_send_what_they_say(script: ModuleType) -> None:
    results = script.run(8)
    assert len({result["plan"] for result in results}) == 8
    for result in results:
        assert result["equal"], result
        assert len(result["measured"]) == script.WORLD
        for found in result["measured"]:
            assert found["activations"] > 0 and found["optimizer"] > 0 and found["messages"]


def test_the_committed_run_is_of_twenty_plans() -> None:
    plans = json.loads((FOLDER / "planned_runs.json").read_text())["plans"]
    assert len({plan["plan"] for plan in plans}) == 20
    assert all(plan["equal"] for plan in plans)
