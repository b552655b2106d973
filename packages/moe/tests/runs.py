"""A tiny run of the command: text, TOML file, and what is read of it afterwards."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = (
    "the",
    "a",
    "of",
    "sun",
    "moon",
    "tree",
    "river",
    "stone",
    "bird",
    "sings",
    "falls",
    "grows",
)

TOML = """
[model]
hidden_size = 16
num_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
expert_intermediate_size = 16
num_experts = 8
num_experts_per_token = 2
initializer_range = 0.1

[model.router]
z_loss_coef = 0.001

[layout]
tp = 2
pp = 2
ep = 4

[data]
source = "{folder}/text"
cache = "{folder}/tokens"
heldout_fraction = 0.2

[training]
steps = 6
global_batch_size = 8
microbatch_size = 2
sequence_length = 16
evaluate_every = 2
evaluation_sequences = 8
checkpoint_every = 3
keep_checkpoints = 10

[training.schedule]
learning_rate = 1e-2
kind = "constant"
"""

ONE_RANK = {"layout.tp": "1", "layout.pp": "1", "layout.ep": "1"}
"""Overrides for a world of one rank."""
TWO_RANKS = {"layout.tp": "2", "layout.pp": "1", "layout.ep": "2"}


def write_run(folder: Path) -> Path:
    """Write documents, each with a mark of its own, and the TOML file; returns that."""
    draw = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for number in range(20):
        words = " ".join(draw.choice(WORDS) for _ in range(30))
        (folder / "text" / f"{number:02d}.txt").write_text(f"mark{number:02d} {words}\n")
    (folder / "run.toml").write_text(TOML.format(folder=folder))
    return folder / "run.toml"


def arguments(overrides: Mapping[str, str]) -> list[str]:
    """Overrides as the command takes them."""
    return [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]


def records(run: Path) -> list[dict[str, Any]]:
    """What a run measured."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Training and held-out losses of a run, by step."""
    return {
        (record["step"], name): record[name]
        for record in records(run)
        for name in ("loss", "heldout_loss", "aux_loss", "z_loss")
        if name in record
    }
