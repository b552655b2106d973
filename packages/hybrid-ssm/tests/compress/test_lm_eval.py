"""The hook for lm-evaluation-harness, on a stand-in for it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fivefold.hybrid_ssm.compress.lm_eval import harness
from fivefold.hybrid_ssm.errors import HybridConfigError

RESULTS = {
    "arc": {"alias": "arc", "acc,none": 0.2, "acc_norm,none": 0.4},
    "gsm": {"exact_match,strict-match": 0.8},
    "odd": {"bleu,none": 3.0},
}


def test_the_mean_of_the_main_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.append(options)
        return {"results": RESULTS}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    assert harness(["arc", "gsm"], limit=5)(Path("folder")) == pytest.approx(0.6)
    assert asked[0]["model_args"] == "pretrained=folder" and asked[0]["limit"] == 5
    with pytest.raises(HybridConfigError, match=r"'odd' .* measures bleu,none; one of acc_norm"):
        harness(["odd"])(Path("folder"))


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HybridConfigError, match=r"pip install 'fivefold-hybrid-ssm\[lm-eval\]'"):
        harness(["arc"])
