"""Which forms of data parallelism can be asked for, and which shards fit."""

import pytest

from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout


def test_experts_take_the_form_of_the_rest_unless_they_have_their_own() -> None:
    config = DataParallelConfig(form="zero1")
    assert (config.form_of("dp-cp"), config.form_of("edp")) == ("zero1", "zero1")
    config = DataParallelConfig(form="zero1", expert_form="zero3")
    assert (config.form_of("dp-cp"), config.form_of("edp")) == ("zero1", "zero3")


@pytest.mark.parametrize(
    ("config", "dense", "experts"),
    [
        (DataParallelConfig(), 8, 4),
        (DataParallelConfig(form="replicate"), 1, 1),
        (DataParallelConfig(form="replicate", expert_form="zero2", expert_shard_size=2), 1, 2),
        (DataParallelConfig(form="zero1", shard_size=2), 2, 4),
        (DataParallelConfig(form="zero3", expert_form="replicate"), 8, 1),
    ],
)
def test_shards_are_over_all_data_ranks_unless_a_size_is_given(
    config: DataParallelConfig, dense: int, experts: int
) -> None:
    layout = Layout(16, tp=2, ep=4)
    config.check(layout)
    sizes = [config.shard_size_of(d, layout.axis_size(d)) for d in ("dp-cp", "edp")]
    assert sizes == [dense, experts]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataParallelConfig(shard_size=3), "shard_size=3 .* the 8 ranks of dp-cp; legal: 1, 2, 4"),
        (DataParallelConfig(expert_shard_size=8), "expert_shard_size=8 .* 4 ranks of edp; legal"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(config: DataParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(Layout(16, tp=2, ep=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "replicate", "shard_size": 2}, "shard_size=2 of the form 'replicate'"),
        ({"expert_form": "replicate", "expert_shard_size": 2}, "expert_shard_size=2 of the form"),
        ({"shard_size": 0}, "shard_size=0; it must be at least 1"),
        ({"form": "zero4"}, "zero4"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataParallelConfig.from_dict(values)
