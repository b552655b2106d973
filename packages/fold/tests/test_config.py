"""Configurations and presets."""

import pytest

from fivefold.fold.config import AlphaFoldConfig, FeatureConfig, LossConfig, StackConfig
from fivefold.fold.errors import FoldConfigError
from fivefold.fold.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plain_data(name: str) -> None:
    found = preset(name)
    for part in (found.model, found.features, found.loss):
        assert type(part).from_dict(part.to_dict()) == part


def test_models_differ_as_in_table_5() -> None:
    templates = [preset(f"model_{n}").model.template is not None for n in range(1, 6)]
    assert templates == [True, True, False, False, False]
    extra = [preset(f"model_{n}").features.max_extra_msa for n in range(1, 6)]
    assert extra == [5120, 1024, 5120, 5120, 1024]
    assert preset("model_4_ptm").model.heads.aligned_error
    assert preset("model_4_ptm").loss.aligned_error == 0.1
    assert preset("model_4").loss.aligned_error == 0
    assert preset("mlperf").loss == LossConfig()
    assert preset("mlperf").features == FeatureConfig(max_msa_clusters=128)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FoldConfigError, match="no preset 'model_6'; there are model_1"):
        preset("model_6")
    with pytest.raises(FoldConfigError, match="c_m is at least 1, found 0"):
        AlphaFoldConfig(c_m=0)
    with pytest.raises(FoldConfigError, match="pair_dropout is at least 0 and below 1, found 1"):
        StackConfig(pair_dropout=1.0)
    with pytest.raises(FoldConfigError, match="num_recycles is at least 0, found -1"):
        FeatureConfig(num_recycles=-1)
    with pytest.raises(FoldConfigError, match="chi is at least 0, found -1"):
        LossConfig(chi=-1.0)
