import subprocess
import sys

import pytest

import fivefold.moe


def test_public_names() -> None:
    for name in fivefold.moe.__all__:
        assert getattr(fivefold.moe, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = fivefold.moe.Nothing


def test_configuration_needs_no_torch() -> None:
    code = "import sys, fivefold.moe; fivefold.moe.MoEConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
