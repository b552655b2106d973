import pytest

from fivefold.kernels.bench import roofline


@pytest.fixture(autouse=True)
def _small_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SECONDS", 0.001)
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(roofline, "_MATMUL_SIZE", {"cpu": 8})
