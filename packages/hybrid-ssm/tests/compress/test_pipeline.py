"""The whole of it on a tiny model: tables, choice, result, kills, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fivefold.hybrid_ssm import HybridForCausalLM
from fivefold.hybrid_ssm.compress import pipeline, school, search
from fivefold.hybrid_ssm.compress.config import CompressConfig
from fivefold.hybrid_ssm.compress.pipeline import minipuzzle
from fivefold.hybrid_ssm.compress.tables import read_table
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.parallel_core.errors import ConfigError

from ..oracles import disarm

Changes = dict[str, Any]


def config_of(text: Path, budget: str = "75%", **changes: Changes) -> CompressConfig:
    sections: dict[str, Changes] = {
        "data": {
            "source": str(text), "cache": str(text.parent / "tokens"), "heldout_fraction": 0.3,
        },
        "importance": {
            "layer_samples": 4, "neuron_samples": 8, "sequence_length": 16, "batch_size": 4,
        },
        "memory": {"weight_bits": 16, "context_length": 64},
        "search": {
            "attention": [0, 1], "mamba": [1, 2], "mlp": [2, 3], "widths": [16, 24],
            "least_use": 0.0, "validation_sequences": 4, "num_finalists": 2,
        },
        "distill": {
            "short_steps": 3, "global_batch_size": 2, "microbatch_size": 2, "sequence_length": 16,
            "checkpoint_every": 1, "cache_logits": True,
        },
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] = sections[name] | values
    return CompressConfig.from_dict({"budget": budget, **sections})


@pytest.fixture
def parent(make_model: Callable[..., HybridForCausalLM], save: Callable[..., Path]) -> Path:
    return save(make_model())


def tables(output: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}


def same_weights(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    return bool(names) and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_a_model_becomes_a_smaller_one(parent: Path, text: Path, tmp_path: Path) -> None:
    config = config_of(text, distill={"long_steps": 2})
    told: list[str] = []
    folder = minipuzzle(parent, tmp_path / "out", config, tell=told.append)
    output = folder.parent
    for stem in ("importance", "candidates", "ranking", "finalists", "choice", "result"):
        assert read_table(output / stem) and (output / f"{stem}.csv").read_text().count("\n") > 1
    assert all((output / f"{name}.png").exists() for name in ("importance", "ranking", "choice"))
    assert [line.split(":")[0] for line in told] == [
        "importance",
        "candidates",
        "ranking",
        "result",
    ]
    ranking, (result,) = read_table(output / "ranking") or [], read_table(output / "result") or []
    assert {row["candidate"] for row in ranking} == set(range(1, len(ranking) + 1))
    budget = 0.75 * pipeline.Job(parent, "", output, config, 1, None).whole
    assert all(row["memory_bytes"] <= budget for row in ranking)
    # Chosen after the short distillation, among those that went through it.
    choice = read_table(output / "choice") or []
    assert {row["candidate"] for row in choice} == {row["candidate"] for row in ranking[:2]}
    assert result["candidate"] == choice[0]["candidate"] and result["steps"] == 5

    model = HybridForCausalLM.from_pretrained(folder)
    assert model.config.pattern == result["pattern"]
    assert model.config.intermediate_size == result["width"]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    disarm(theirs, model.config)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids), theirs(ids, use_cache=False).logits, rtol=0, atol=2e-5
        )
    card = (folder / "README.md").read_text()
    assert "## Lineage" in card and str(parent) in card and "5 steps of 2 sequences" in card
    assert (folder / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()


def test_a_killed_stage_goes_on_to_the_same_result(
    parent: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(text)
    whole = minipuzzle(parent, tmp_path / "whole", config)
    calls = {"count": 0}

    class Killed(BaseException):
        pass

    def mortal(function: Callable[..., Any], dies_at: int) -> Callable[..., Any]:
        calls["count"] = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            calls["count"] += 1
            if calls["count"] == dies_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    deaths = [
        (search, "score_pass", 2),  # between batches of importance
        (pipeline.Job, "quality", 3),  # between candidates
        (school, "write_student", 2),  # between finalists' folders
        (school, "launch", 2),  # between distillations
        (school, "_after", 2),  # between measurements of distilled finalists
    ]
    for owner, name, dies_at in deaths:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mortal(getattr(owner, name), dies_at))
            with pytest.raises(Killed):
                minipuzzle(parent, tmp_path / "killed", config)
    with monkeypatch.context() as patch:
        patch.setattr(search, "score_pass", mortal(search.score_pass, 1))  # all of it is there
        killed = minipuzzle(parent, tmp_path / "killed", config)
    assert same_weights(whole, killed)
    assert tables(whole.parent) == tables(killed.parent)


def test_a_distillation_that_lost_its_last_checkpoint(
    parent: Path, text: Path, tmp_path: Path
) -> None:
    config = config_of(text, search={"num_finalists": 1})
    folder = minipuzzle(parent, tmp_path / "out", config)
    shutil.copytree(folder, tmp_path / "first")
    (run,) = (tmp_path / "out" / "short").iterdir()
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    shutil.rmtree(tmp_path / "out" / "model")
    assert same_weights(minipuzzle(parent, tmp_path / "out", config), tmp_path / "first")


def test_a_benchmark_decides(parent: Path, text: Path, tmp_path: Path) -> None:
    """Among the best ranked and, after distillation, among finalists: here for fewer layers."""
    scored: list[str] = []

    def benchmark(folder: Path) -> float:
        scored.append(folder.parent.name)
        return -float(HybridForCausalLM.from_pretrained(folder).config.num_layers)

    config = config_of(text, search={"num_ranked": 3})
    minipuzzle(parent, tmp_path / "out", config, benchmark=benchmark)
    assert scored == ["pruned"] * 3 + ["distilled"] * 2
    ranking = read_table(tmp_path / "out" / "ranking") or []
    (result,) = read_table(tmp_path / "out" / "result") or []
    assert len(result["pattern"]) == min(len(row["pattern"]) for row in ranking[:3])


def test_what_is_refused_before_any_work(parent: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(HybridConfigError, match=r"none of the \d+ candidates fits the budget"):
        minipuzzle(parent, out, config_of(text, "1%"))
    with pytest.raises(HybridConfigError, match=r"another budget \(budget: 1%, now 2%\); go"):
        minipuzzle(parent, out, config_of(text, "2%"))
    with pytest.raises(HybridConfigError, match="budget is 'much'"):
        minipuzzle(parent, tmp_path / "other", config_of(text, "much"))
    with pytest.raises(ConfigError, match=r"layout\.pp is 2; .* one pipeline stage"):
        config_of(text, distill={"layout": {"pp": 2}})
    with pytest.raises(ConfigError, match="unknown key"):
        config_of(text, search={"width": [3]})


def test_a_text_of_another_tokenizer(parent: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(parent, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ":', '"Ġ" :'))
    data = {"tokenizer": str(tmp_path / "other")}
    with pytest.raises(HybridConfigError, match=r"is not that of the text .* must share one"):
        minipuzzle(parent, tmp_path / "out", config_of(text, data=data))
