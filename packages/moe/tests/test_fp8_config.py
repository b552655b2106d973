"""What may be asked of FP8."""

import pytest

from fivefold.moe.errors import MoEConfigError
from fivefold.moe.fp8_config import FP8Config


def test_some_layer_is_left() -> None:
    FP8Config(first=1, last=2).check(4)
    with pytest.raises(MoEConfigError, match=r"first=2 and last=2 leave none of the 4 layers"):
        FP8Config(first=2, last=2).check(4)
    with pytest.raises(MoEConfigError, match="last is -1; as many layers stay"):
        FP8Config(last=-1)


def test_plain_data_and_back() -> None:
    config = FP8Config(first=1, gradients="e4m3", power_of_2_scale=True, experts=False)
    assert FP8Config.from_dict(config.to_dict()) == config
