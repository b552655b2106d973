"""The public names of the package, and the ops that it finds."""

import subprocess
import sys

import pytest

import fivefold.kernels
from fivefold.kernels import KernelInputError
from fivefold.kernels.selection import select


@pytest.mark.parametrize("name", fivefold.kernels.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(fivefold.kernels, name)
    assert found.__name__ == name
    assert found.__doc__


def test_the_names_are_known_before_anything_is_imported() -> None:
    code = (
        "import sys, fivefold.kernels as k\n"
        "assert set(k.__all__) <= set(dir(k))\n"
        "assert 'torch' not in sys.modules\n"
        "from fivefold.kernels import rms_norm\n"
        "assert callable(rms_norm)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match=r"fivefold\.kernels.* has no attribute 'dropout'"):
        fivefold.kernels.dropout  # noqa: B018


def test_ops_are_selected_once_and_in_one_order() -> None:
    everything = select([])
    assert ("kernels", "rms_norm") in everything
    assert select(["swiglu", "kernels/rms_norm", "rms_norm"]) == [
        each for each in everything if each in (("kernels", "rms_norm"), ("kernels", "swiglu"))
    ]


def test_an_op_that_is_not_there() -> None:
    with pytest.raises(KernelInputError, match=r"no op kernels/dropout; there are .*rms_norm"):
        select(["dropout"])
