"""Two real chains, prepared once, and the shortest run there is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fold_network import tiny_config

from fivefold.fold.data.prepare import prepare
from fivefold.fold.training.config import RunConfig, load_run

REAL = Path(__file__).parents[1] / "real"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ubiquitin and a chain of 70 residues with selenomethionine."""
    folder = tmp_path_factory.mktemp("structures")
    for name in ("1ubq", "1a8o"):
        shutil.copy(REAL / "structures" / f"{name}.cif.gz", folder)
    out = tmp_path_factory.mktemp("prepared")
    prepare(folder, out, files_per_shard=1, progress=False)
    return out


@pytest.fixture(scope="session")
def plain(prepared: Path) -> dict[str, Any]:
    """A run of the narrowest network, as a file would say it."""
    dropout = {"evoformer": {"msa_dropout": 0.2, "pair_dropout": 0.2}}
    return {
        "preset": "small",
        "model": {**tiny_config(template=None).to_dict(), "template": "none", **_drop(dropout)},
        "features": {
            "crop_size": 12,
            "max_msa_clusters": 2,
            "max_extra_msa": 2,
            "max_templates": 0,
            "num_recycles": 1,
        },
        "data": {"prepared": str(prepared), "sampling": "uniform", "num_workers": 0},
        "training": {
            "steps": 4,
            "global_batch_size": 2,
            "seed": 3,
            "schedule": {"learning_rate": 1e-2, "warmup_steps": 1},
            "precision": {"parameters": "float64", "compute": "float64"},
        },
        "evaluation": {"on_training_chains": True, "max_chains": 1, "num_recycles": 0},
    }


def _drop(changes: dict[str, Any]) -> dict[str, Any]:
    stack = tiny_config().evoformer.to_dict()
    return {name: {**stack, **values} for name, values in changes.items()}


@pytest.fixture
def config(plain: dict[str, Any]) -> RunConfig:
    """The same, read."""
    return load_run(plain)
