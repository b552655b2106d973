"""Models over ranks: what fits, and that every layout trains the same model."""

from functools import cache

import pytest

from fivefold.moe import MoEConfig, MoEForCausalLM, sharding
from fivefold.moe.capacity_config import CapacityConfig
from fivefold.moe.dispatchers import DispatchConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.router_config import RouterConfig
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.sequence_split import ContextConfig

from .law import DOUBLE, LOSSES, MODEL, STEPS, Case, Record, Verdict, judge, plain_run, with_model

TWELVE = with_model(num_experts=12, num_experts_per_token=3)
UNEVEN = with_model(num_layers=3)
DEEP = with_model(num_layers=5)
HEADS = with_model(num_key_value_heads=4)
TIED = with_model(tie_word_embeddings=True)
ONE_KEY_HEAD = with_model(num_key_value_heads=1)
DEEP_TIED = with_model(num_layers=5, tie_word_embeddings=True)
QWEN2 = with_model(
    model_type="qwen2_moe",
    num_layers=3,
    qkv_bias=True,
    shared_intermediate_size=8,
    shared_gate=True,
    dense_layers=(1,),
    intermediate_size=8,
    router=RouterConfig(normalize=False, z_loss_coef=0.01),
)
QWEN3 = with_model(model_type="qwen3_moe", qk_norm=True, dense_layers=(0,), intermediate_size=8)
GLM4 = with_model(
    model_type="glm4_moe",
    qk_norm=True,
    qkv_bias=True,
    rotary_fraction=0.5,
    shared_intermediate_size=32,
    router=RouterConfig(
        score="sigmoid",
        scale=2.5,
        num_groups=4,
        groups_per_token=2,
        expert_bias=True,
        bias_rate=0.01,
        aux_loss_coef=0.1,
        global_loss_coef=0.1,
    ),
)
TIGHT = with_model(
    capacity=CapacityConfig(factor=0.7, among="sequence"),
    router=RouterConfig(aux_loss_coef=0.1, global_loss_coef=0.2),
)
FIRST = with_model(capacity=CapacityConfig(factor=0.5, among="sequence", keep="position", pad=True))
ONCE, GATHER = DispatchConfig(dispatcher="deduplicated"), DispatchConfig(dispatcher="all_gather")
ZIGZAG = ContextConfig(split="zigzag")
ZERO3 = DataParallelConfig(form="zero3")
BFLOAT16 = Precision(compute="bfloat16")


def case(model: MoEConfig = MODEL, /, **values: object) -> Case:
    """A case; what is not its own is the layout's."""
    names = (
        "stages_per_rank",
        "microbatch_size",
        "precision",
        "data",
        "recompute",
        "context",
        "packed",
        "dispatch",
        "world",
        "steps",
    )
    own = {name: values.pop(name) for name in names if name in values}
    return Case(degrees=tuple(values.items()), model=model, **own)  # type: ignore[arg-type]


CASES = [
    case(microbatch_size=1),
    case(ep=8, microbatch_size=1),
    case(tp=2, cp=2, ep=8),  # EP over TP, CP and DP at once
    case(tp=2, ep=4),  # EDP 2, DP 4
    case(tp=2, ep=4, data=ZERO3),
    case(tp=2, ep=4, data=DataParallelConfig(form="zero1")),
    case(tp=2, pp=2, ep=2, data=DataParallelConfig(form="replicate", expert_form="zero1")),
    case(ep=4, microbatch_size=1, data=DataParallelConfig(shard_size=4, expert_form="zero1")),
    case(TWELVE, tp=2, ep=4),  # three experts per rank
    case(tp=2, etp=4, ep=2),  # ETP > TP
    case(etp=4, microbatch_size=1),  # ETP without EP
    case(etp=8, cp=2),
    case(HEADS, tp=4, etp=2, ep=2),  # vocabulary 37 over 4
    case(tp=2, cp=2, etp=2, ep=4, microbatch_size=4),
    case(cp=8, ep=4, microbatch_size=8),
    case(TIED, tp=2, ep=4),
    case(tp=4, ep=2, etp=4),  # two key heads over four ranks
    case(ONE_KEY_HEAD, tp=4, ep=8, recompute="full"),
    case(
        ONE_KEY_HEAD,
        tp=2,
        cp=2,
        ep=2,
        context=ContextConfig(attention="heads", split="zigzag"),
    ),
    case(TIED, tp=4, pp=2, ep=4),  # and two key heads over four ranks
    case(DEEP_TIED, tp=2, pp=2, ep=4, stages_per_rank=2),
    case(tp=2, ep=4, order="ep-cp-tp-dp-pp"),
    case(tp=2, cp=2, etp=2, ep=2, order="dp-ep-cp-tp-pp", microbatch_size=4),
    case(tp=2, pp=2, ep=4),  # CP·TP 2, EP·ETP 4
    case(tp=2, cp=2, pp=2, etp=2, microbatch_size=4),  # CP·TP 4, EP·ETP 2
    case(UNEVEN, tp=2, cp=2, pp=2, ep=4),  # 2 layers and 1; four microbatches
    case(tp=2, pp=2, ep=2, order="tp-cp-ep-pp-dp"),
    case(DEEP, pp=4, ep=2, microbatch_size=1),  # 2, 1, 1 and 1 layers
    case(DEEP, tp=2, pp=2, ep=4, stages_per_rank=2),
    case(DEEP, tp=2, cp=2, pp=2, etp=2, ep=2, stages_per_rank=2, microbatch_size=4),
    case(tp=2, cp=2, ep=8, recompute="full"),
    case(cp=4, ep=2, microbatch_size=4, context=ContextConfig(split="zigzag")),
    case(HEADS, cp=4, ep=2, microbatch_size=4, context=ContextConfig(attention="heads")),
    case(tp=2, cp=2, ep=8, context=ContextConfig(attention="heads", split="zigzag")),
    case(cp=4, ep=8, microbatch_size=4, context=ContextConfig(attention="ring")),
    case(
        with_model(sliding_window=5),
        tp=2,
        cp=2,
        pp=2,
        packed=True,
        recompute="full",
        context=ContextConfig(attention="ring", split="zigzag"),
    ),
    case(tp=2, cp=2, ep=8, packed=True, context=ContextConfig(attention="heads")),
    case(
        tp=2, cp=4, ep=2, microbatch_size=8, context=ContextConfig(attention="ring", split="zigzag")
    ),
    case(
        with_model(sliding_window=5),
        cp=4,
        pp=2,
        microbatch_size=4,
        recompute="full",
        context=ContextConfig(attention="ring", split="zigzag"),
    ),
    case(QWEN2, tp=2, cp=2, ep=8),
    case(QWEN2, tp=2, pp=2, ep=2, etp=2, dispatch=ONCE, data=ZERO3),
    case(QWEN3, tp=2, cp=2, pp=2, ep=4, dispatch=GATHER),
    case(GLM4, tp=2, cp=2, ep=4, etp=2, context=ZIGZAG),
    case(GLM4, tp=2, pp=2, ep=4, dispatch=ONCE, data=ZERO3, recompute="full"),
    case(GLM4, ep=8, microbatch_size=1, dispatch=GATHER),
    case(TIGHT, tp=2, cp=2, ep=8, microbatch_size=4),
    case(TIGHT, cp=4, pp=2, ep=2, context=ZIGZAG, dispatch=ONCE, recompute="moe"),
    case(TIGHT, tp=2, ep=2, etp=2, dispatch=GATHER),
    case(FIRST, tp=2, cp=2, ep=4, context=ZIGZAG, microbatch_size=4),
    case(FIRST, tp=2, pp=2, ep=2, etp=2, microbatch_size=1),
    case(tp=2, ep=4, data=ZERO3, recompute="full"),
    case(UNEVEN, tp=2, cp=2, pp=2, ep=4, recompute="attention_core+experts"),
    case(DEEP, tp=2, pp=2, ep=4, stages_per_rank=2, recompute="attention+moe+norms"),
    case(tp=2, cp=2, ep=4, steps=20),
    case(GLM4, tp=2, pp=2, ep=2, etp=2, steps=20),
    case(tp=2, cp=2, pp=2, ep=8, world=16),
    case(QWEN2, tp=2, cp=2, etp=2, ep=4, world=16),  # EDP 2 over DP, EP over CP and DP
]


@cache
def reference(model: MoEConfig, packed: bool = False, steps: int = STEPS) -> Record:
    return plain_run(model, packed, steps)


@cache
def verdict(case: Case) -> list[Verdict]:
    """What each rank found. A launch for each case: gloo's groups cost time while they live."""
    expected = reference(case.model, case.packed, case.steps)
    return launch(judge, case.world, case, expected, timeout=300)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_the_same_model(case: Case) -> None:
    assert case.precision.compute == DOUBLE.compute
    expected = reference(case.model, case.packed, case.steps)
    for rank in verdict(case):
        for what, distance in rank.distances.items():
            # Adam divides small differences by small gradients.
            assert distance < (1e-11 if what.startswith("parameters[") else 1e-12), what
        compared = {name.split("[")[0] for name in rank.distances}
        assert {"loss", "norm", *LOSSES, "parameters", "gradients"} >= compared
        assert rank.scalars.keys() == expected.scalars.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_held_and_counted_once(case: Case) -> None:
    total: dict[str, int] = {}
    for rank in verdict(case):
        for name, count in rank.counted.items():
            total[name] = total.get(name, 0) + count
    assert total == {name: p.numel() for name, p in MoEForCausalLM(case.model).named_parameters()}


def test_bfloat16_is_near() -> None:
    """Over four seeds the first step was off by 0.2 % (norm 1.1 %), the later ones by 2.2 % (16 %).

    What grows is what routing decides: a token near the border between two experts takes the other
    one, which changes its gradient and the balance of experts, but hardly the loss.
    """
    first = {"norm": 0.03, "loss": 0.005, "aux_loss": 0.005, "z_loss": 0.005}
    later = {"norm": 0.25, "loss": 0.02, "aux_loss": 0.05, "z_loss": 0.02}
    scalars = verdict(case(tp=2, pp=2, ep=4, precision=BFLOAT16))[0].scalars
    for name, expected in reference(MODEL).scalars.items():
        kind, step = name.rstrip("]").split("[")
        near = (first if step == "0" else later)[kind]
        assert scalars[name] == pytest.approx(expected, rel=near), name


@pytest.mark.parametrize(
    ("changes", "degrees", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4},
            {"tp": 4},
            r"num_attention_heads=6 cannot be split over tp=4; tp may be 1, 2, 3, 6$",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4},
            {"tp": 4},
            r"num_key_value_heads=3 cannot be split over tp=4; tp may be a divisor or a multiple",
        ),
        (
            {"num_experts": 12},
            {"ep": 8},
            r"num_experts=12 cannot be split over ep=8; ep may be 1, 2, 3, 4, 6, 12$",
        ),
        (
            {"expert_intermediate_size": 6},
            {"etp": 4},
            r"expert_intermediate_size=6 cannot be split over etp=4; etp may be 1, 2, 3, 6$",
        ),
        (
            {},
            {"tp": 2, "cp": 4},
            r"sequence_length=12 cannot be split over tp\*cp=8; tp\*cp may be 1, 2, 3, 4, 6, 12$",
        ),
    ],
)
def test_check_names_what_does_not_fit(
    changes: dict[str, int], degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(MoEConfigError, match=message):
        sharding.check(with_model(**changes), Layout(8, **degrees), 12)


def test_check_knows_what_ulysses_needs_of_the_key_heads() -> None:
    model = with_model(num_attention_heads=24, num_key_value_heads=6, head_dim=4)
    message = r"num_key_value_heads=3 of a tensor rank cannot be split over cp=2; cp may be a"
    with pytest.raises(MoEConfigError, match=message):
        sharding.check(model, Layout(4, tp=2, cp=2), 16, ContextConfig(attention="heads"))
    sharding.check(model, Layout(4, tp=2, cp=2), 16)
    sharding.check(model, Layout(6, tp=2, cp=3), 12, ContextConfig(attention="heads"))


def test_check_lists_only_the_first_of_many_legal_values() -> None:
    model = with_model(num_experts=5040)
    with pytest.raises(MoEConfigError, match=r"ep may be 1, 2, 3, 4, 5, .*, 14, \.\.\.$"):
        sharding.check(model, Layout(32, ep=32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_passes_what_runs(case: Case) -> None:
    sharding.check(case.model, Layout(case.world, **dict(case.degrees)), 16)  # type: ignore[arg-type]


def test_check_stages() -> None:
    sharding.check_stages(MODEL, 2)
    with pytest.raises(MoEConfigError, match=r"num_layers=2 cannot fill 4 pipeline stages"):
        sharding.check_stages(MODEL, 4)
