"""What AlphaFold's data code says of the files in ``tests/real``."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real() -> Path:
    """Structures, alignments and hits that PyPI packages ship."""
    return TESTS / "real"


@pytest.fixture(scope="session")
def data_goldens() -> dict[str, Any]:
    """Digests of AlphaFold's arrays; ``oracle/make_data_goldens.py`` says of which."""
    return json.loads((TESTS / "oracle/data_goldens.json").read_text())


@pytest.fixture(scope="session")
def digest() -> Any:
    """The digest of an array, as the goldens have it."""

    def of(array: np.ndarray) -> str:
        text = str(array.shape) + (array + 0).tobytes().hex()
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    return of


@pytest.fixture(scope="session")
def unpacked(real: Path) -> Any:
    """The text of a file in ``tests/real``."""
    return lambda name: gzip.decompress((real / name).read_bytes()).decode()
