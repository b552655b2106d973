"""Parameters and inputs that the tests share."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.params.convert import from_alphafold
from fivefold.fold.params.names import table

ORACLE = Path(__file__).parent / "oracle"
sys.path[:0] = [str(ORACLE), str(ORACLE.parent)]

from fold_network import alphafold_arrays, cycle_features, oracle_config, tiny_config  # noqa: E402


@pytest.fixture(scope="session")
def goldens() -> dict[str, np.ndarray]:
    """What AlphaFold's JAX code says."""
    return dict(np.load(ORACLE / "goldens.npz"))


@pytest.fixture(scope="session")
def structure() -> dict[str, Tensor]:
    """The true structure and the templates of the goldens, and everything about them."""
    found = {k: torch.from_numpy(v) for k, v in np.load(ORACLE / "structure.npz").items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


@pytest.fixture(scope="session")
def oracle_model() -> AlphaFold:
    """The network of the goldens with their parameters."""
    config = oracle_config()
    model = AlphaFold(config)
    known = table(config)
    model.load_state_dict(from_alphafold(alphafold_arrays(config), known))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> AlphaFold:
    """The narrowest network that has everything, with parameters from seeds."""
    config = tiny_config()
    model = AlphaFold(config)
    model.load_state_dict(from_alphafold(alphafold_arrays(config), table(config)))
    return model.eval()


@pytest.fixture
def features(structure: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of the first iteration of the goldens."""
    return cycle_features(structure, 0)
