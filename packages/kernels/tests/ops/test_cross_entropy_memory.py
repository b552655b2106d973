"""At 131,072 classes the losses take at most a quarter of what torch's take of float32 logits."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fivefold.kernels.ops.cross_entropy import cross_entropy
from fivefold.kernels.ops.linear_cross_entropy import chunks, linear_cross_entropy

CLASSES = 131072


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_that_are_given(backend: str, tmp_path: Path) -> None:
    logits, target = torch.randn(64, CLASSES), torch.randint(0, CLASSES, (64,))
    ours = logits.bfloat16().requires_grad_()
    theirs = logits.requires_grad_()
    found = _peak(lambda: cross_entropy(ours, target, backend=backend).backward(), tmp_path)
    most = _peak(lambda: F.cross_entropy(theirs, target).backward(), tmp_path)
    # Bytes a logit: 4 of log-probabilities and twice 4 of gradients.
    assert most >= 12 * logits.numel()
    # 2 of a gradient, and in the reference some rows in float32.
    parts = 4 << 20 if backend == "reference" else 0
    assert found <= 2 * logits.numel() + parts + (1 << 16)
    assert found <= most / 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_a_linear_layer(reduction: str, tmp_path: Path) -> None:
    x, target = torch.randn(128, 2, requires_grad=True), torch.randint(0, CLASSES, (128,))
    weight = torch.randn(CLASSES, 2, requires_grad=True)

    def ours() -> None:
        linear_cross_entropy(x, weight, target, reduction=reduction, backend="cpu").sum().backward()

    def theirs() -> None:
        F.cross_entropy(F.linear(x, weight), target, reduction=reduction).sum().backward()

    found, most = _peak(ours, tmp_path), _peak(theirs, tmp_path)
    assert found <= most / 4
    # The logits of a chunk and their gradient, and the weight's gradient before and after it is
    # scaled.
    assert found <= chunks._BUDGET["cpu"] + 2 * weight.nbytes + (1 << 20)


def _peak(function: Callable[[], None], folder: Path) -> int:
    """The most bytes that are allocated at once, beyond those that were there before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    moves = [each for each in events if each["name"] == "[memory]"]
    moves.sort(key=lambda each: each["args"]["Ev Idx"])
    return max(accumulate(each["args"]["Bytes"] for each in moves))
