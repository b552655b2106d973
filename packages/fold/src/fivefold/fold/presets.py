"""The networks that have a name: AlphaFold's five, with and without pTM, and MLPerf's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fivefold.fold.config import (
    AlphaFoldConfig,
    FeatureConfig,
    HeadsConfig,
    LossConfig,
    StackConfig,
    StructureConfig,
    TemplateConfig,
)
from fivefold.fold.errors import FoldConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A network with what it is fed and scored by.

    Attributes:
        model: the network.
        features: sizes of its input.
        loss: that it is trained with.
    """

    model: AlphaFoldConfig
    features: FeatureConfig
    loss: LossConfig


def preset(name: str) -> Preset:
    """A preset by name.

    Args:
        name: ``model_1`` to ``model_5`` and ``model_1_ptm`` to ``model_5_ptm`` (supplement, table
            5), ``initial_training``, ``mlperf`` (MLPerf HPC 3.0), or ``small`` for two cores.

    Raises:
        FoldConfigError: no such preset.
    """
    if name not in PRESETS:
        raise FoldConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def _model(number: int, aligned_error: bool) -> Preset:
    with_templates = number in (1, 2)
    heads = HeadsConfig(aligned_error=aligned_error)
    loss = LossConfig(violation=1.0, experimentally_resolved=0.01)
    return Preset(
        model=AlphaFoldConfig(template=TemplateConfig() if with_templates else None, heads=heads),
        features=FeatureConfig(
            crop_size=384,
            max_extra_msa=5120 if number in (1, 3, 4) else 1024,
            max_templates=4 if with_templates else 0,
        ),
        loss=replace(loss, aligned_error=0.1) if aligned_error else loss,
    )


def _initial_training() -> Preset:
    return Preset(
        model=AlphaFoldConfig(),
        features=FeatureConfig(max_msa_clusters=128),
        loss=LossConfig(),
    )


def _small() -> Preset:
    """A network that learns a small protein in minutes on two cores."""
    stack = StackConfig(num_blocks=2, c_triangle=64, msa_dropout=0.0, pair_dropout=0.0)
    extra = replace(stack, num_blocks=1, msa_head_width=8)
    template = replace(TemplateConfig().stack, num_blocks=1, msa_dropout=0.0, pair_dropout=0.0)
    return Preset(
        model=AlphaFoldConfig(
            c_m=64,
            c_z=64,
            c_s=128,
            c_e=32,
            evoformer=stack,
            extra_msa=extra,
            template=TemplateConfig(c_pair=32, stack=template),
            structure=StructureConfig(num_layers=4, dropout=0.0),
        ),
        features=FeatureConfig(crop_size=128, max_msa_clusters=16, max_extra_msa=64),
        loss=LossConfig(masked_msa=0.1),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {
    **{
        f"model_{number}{suffix}": lambda number=number, suffix=suffix: _model(  # type: ignore[misc]
            number, bool(suffix)
        )
        for suffix in ("", "_ptm")
        for number in range(1, 6)
    },
    "initial_training": _initial_training,
    # MLPerf's network is the one that AlphaFold starts its training with.
    "mlperf": _initial_training,
    "small": _small,
}
