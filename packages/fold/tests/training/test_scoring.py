"""Whole chains are scored once each, over ranks as in one process."""

import shutil
from pathlib import Path

import torch

from fivefold.fold.data.dataset import Chains
from fivefold.fold.data.features import Draw, prediction_features
from fivefold.fold.metrics import lddt_ca
from fivefold.fold.training.config import RunConfig
from fivefold.fold.training.run import build_model
from fivefold.fold.training.scoring import placed, score_chains
from fivefold.parallel_core.topology import Topology


def test_scores_are_those_of_the_predictions(config: RunConfig, prepared: Path) -> None:
    chains = Chains(prepared)
    model = build_model(config, Topology.local()).parts[0].eval()
    parts = [score_chains(model, chains, config.features, 1, rank=r, size=2) for r in range(2)]
    sums = {name: parts[0].sums[name] + parts[1].sums[name] for name in ("scores", "scored")}
    assert sums["scored"].tolist() == [1.0] * len(chains)
    for number in range(len(chains)):
        cycles = prediction_features(chains[number], config.features, Draw(sample=number), 1)
        cycles = [placed(each, torch.device("cpu"), torch.float64) for each in cycles]
        with torch.no_grad():
            found = model(cycles)["structure_module"]["final_atom_positions"]
        truth = cycles[-1]["all_atom_positions"], cycles[-1]["all_atom_mask"]
        torch.testing.assert_close(sums["scores"][number], lddt_ca(found, *truth))


def test_what_cannot_be_scored_is_named(config: RunConfig, prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    chains = Chains(folder, ["1ubq_A", "1a8o_A"])
    (folder / chains.records[0]["shard"]).write_bytes(b"broken")
    model = build_model(config, Topology.local()).parts[0].eval()
    found = score_chains(model, chains, config.features, 0)
    assert found.sums["scored"].tolist() == [0.0, 1.0]
    assert len(found.problems) == 1 and "1ubq_A cannot be read" in found.problems[0]
