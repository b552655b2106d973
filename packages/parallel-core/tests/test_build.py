"""From a constructor to what one rank holds, on one rank; many ranks are in test_plan."""

from collections.abc import Mapping

import pytest
import torch

from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.pipeline import LocalRunner, PipelineConfig, Runner
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.styles import ContextPositions, Replicate, Style
from fivefold.parallel_core.topology import Topology

from .imagined import imagined
from .rig import DOUBLE
from .toy import HEAD, TAIL, Toy, ToyConfig, plan, rule

CONFIG = ToyConfig(num_experts=2)


def made(**options: object) -> Toy:
    """What ``build`` makes of the toy here."""
    model = build(
        lambda: Toy(CONFIG), Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL, **options
    )  # type: ignore[arg-type]
    (part,) = model.parts
    assert isinstance(part, Toy)
    return part


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"precision": DOUBLE}, torch.float64),
    ],
)
def test_parameters_have_storage_in_the_dtype_asked_for(
    options: dict[str, object], dtype: torch.dtype
) -> None:
    part = made(**options)
    assert {p.dtype for p in part.parameters()} == {dtype}
    assert {p.device.type for p in part.parameters()} == {"cpu"}


def test_the_whole_model_is_never_made_off_the_meta_device() -> None:
    devices = set()

    def make() -> Toy:
        model = Toy(CONFIG)
        devices.update(p.device.type for p in model.parameters())
        return model

    build(make, Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL)
    assert devices == {"meta"}


def test_one_table_and_one_list_of_pieces_for_the_model() -> None:
    model = build(lambda: Toy(CONFIG), Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL)
    model.initialise(rule, 3)
    names = [name for name, _ in Toy(CONFIG).named_parameters()]
    assert [piece.name for piece in model.pieces()] == names
    assert set(model.table) == set(names)
    assert all(piece.tensor.isfinite().all() for piece in model.pieces())


def test_a_pattern_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer\.\*\.norm name no module of Toy"):
        build(
            lambda: Toy(CONFIG),
            Topology.local(),
            {**plan(CONFIG), "layer.*.norm": Replicate()},
            head=HEAD,
            tail=TAIL,
        )


def test_side_outputs_of_all_parts_are_weighed_and_drained_together() -> None:
    model = build(lambda: Toy(CONFIG), Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL)
    other = Toy(CONFIG)
    model = type(model)([*model.parts, other, torch.nn.Linear(2, 2)], model.table, model.topology)
    model.weigh_side_losses(0.5)
    sides = [part.side for part in model.parts[:2]]
    assert [side.weight for side in sides] == [0.5, 0.5]
    sides[0].count("aux", torch.tensor(1.0))
    sides[1].count("aux", torch.tensor(2.0))
    sides[1].count("z", torch.tensor(4.0))
    assert {k: v.item() for k, v in model.drain_side_outputs().items()} == {"aux": 3.0, "z": 4.0}
    assert model.drain_side_outputs() == {}


def test_training_mode_reaches_every_part() -> None:
    model = build(lambda: Toy(CONFIG), Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL)
    model.train(False)
    assert not any(module.training for part in model.parts for module in part.modules())
    model.train()
    assert all(module.training for part in model.parts for module in part.modules())


def test_one_stage_is_run_here() -> None:
    model = build(lambda: Toy(CONFIG), Topology.local(), plan(CONFIG), head=HEAD, tail=TAIL)
    runner = make_runner(
        model,
        PipelineConfig(),
        num_microbatches=3,
        microbatch_size=1,
        sequence_length=4,
        hidden_size=CONFIG.hidden_size,
        vocab_size=CONFIG.vocab_size,
        dtype=torch.float32,
    )
    assert isinstance(runner, LocalRunner)
    assert runner.num_microbatches == 3


def runner_of(
    length: int, context: ContextConfig, changes: Mapping[str, Style], sequence: bool = True
) -> Runner:
    """On the first of 4 ranks, tp 2 and cp 2."""
    styles = {**plan(CONFIG, sequence=sequence, context=context), **changes}
    ranks = imagined(4, tp=2, cp=2)
    model = build(lambda: Toy(CONFIG), ranks[0], styles, head=HEAD, tail=TAIL)
    return make_runner(
        model,
        PipelineConfig(),
        num_microbatches=1,
        microbatch_size=1,
        sequence_length=length,
        hidden_size=CONFIG.hidden_size,
        vocab_size=CONFIG.vocab_size,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("form", ["gather", "ring", "heads"])
@pytest.mark.parametrize(("split", "multiple"), [("contiguous", 4), ("zigzag", 4)])
def test_a_sequence_that_does_not_divide_is_refused_at_construction(
    form: str, split: str, multiple: int
) -> None:
    context = ContextConfig(attention=form, split=split)  # type: ignore[arg-type]
    message = rf"sequence_length=10 .* {split} over cp=2 and, .* tp=2: .* multiple of {multiple}"
    with pytest.raises(ConfigError, match=message):
        runner_of(10, context, {})
    assert isinstance(runner_of(12, context, {}), LocalRunner)


def test_without_sequence_parallelism_tensor_ranks_take_any_length() -> None:
    assert isinstance(runner_of(10, ContextConfig(), {}, sequence=False), LocalRunner)
    with pytest.raises(ConfigError, match=r"sequence_length=9 .* multiple of 2, such as 8 or 10"):
        runner_of(9, ContextConfig(), {}, sequence=False)


def test_padding_is_zero_before_anything_is_filled() -> None:
    """37 ids over two ranks: the second holds 18 rows and one of padding."""
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    try:
        model = build(lambda: Toy(CONFIG), imagined(2, tp=2)[1], plan(CONFIG), head=HEAD, tail=TAIL)
    finally:
        torch.use_deterministic_algorithms(False)
    padded = [p for p in model.pieces() if p.local.shape != p.tensor.shape]
    assert [p.name for p in padded] == ["embed_tokens.weight", "lm_head.weight"]
    for piece in padded:
        assert piece.local.shape[0] == 19
        assert piece.local[18:].eq(0).all()


def test_two_ways_to_split_a_sequence_are_refused() -> None:
    changes = {"positions": ContextPositions("zigzag")}
    with pytest.raises(ConfigError, match=r"zigzag at 'positions' and contiguous at 'layers\.0"):
        runner_of(16, ContextConfig(), changes)
