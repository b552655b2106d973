"""Models over ranks: what fits, and that every layout trains the same model."""

from functools import cache
from typing import Any

import pytest

from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM, sharding
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.sharding import HybridContextConfig
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout

from .law import MODEL, STEPS, Case, Record, Verdict, judge, plain_run, with_model

PLAIN = with_model(pattern="MM", model_type="mamba2", hidden_size=24)
TIED = with_model(tie_word_embeddings=True)
BIASES = with_model(use_bias=True, mlp_bias=True, latent_size=None)
TWO_GROUPS = with_model(num_groups=2, use_bias=True)
ONE_GROUP = with_model(num_groups=1, pattern="M*", use_conv_bias=False)
ONE_KEY_HEAD = with_model(num_key_value_heads=1)
STATES_ZIGZAG = HybridContextConfig(split="zigzag")
HEADS = HybridContextConfig(attention="heads", mamba="heads")
HEADS_ZIGZAG = HybridContextConfig(attention="ring", mamba="heads", split="zigzag")


def case(world: int, model: HybridConfig = MODEL, /, **values: Any) -> Case:
    """A case; what is not its own is the layout's."""
    names = ("stages_per_rank", "microbatch_size", "recompute", "context", "packed")
    own = {name: values.pop(name) for name in names if name in values}
    return Case(world=world, degrees=tuple(values.items()), model=model, **own)


CASES = [
    case(2, tp=2),
    case(2, cp=2, packed=True),
    case(4, tp=4, etp=2, recompute="full"),
    case(4, TIED, tp=2, ep=4, packed=True),
    case(4, cp=4, ep=2, microbatch_size=4, context=STATES_ZIGZAG, packed=True),
    case(4, cp=4, microbatch_size=4, context=HEADS),
    case(4, with_model(num_groups=2, pattern="MM*"), cp=4, context=HEADS_ZIGZAG, packed=True),
    case(4, tp=2, cp=2, ep=4, recompute="selective"),
    case(2, BIASES, pp=2, ep=1, packed=True),
    case(4, tp=2, pp=2, ep=2, stages_per_rank=2),
    case(4, PLAIN, tp=2, cp=2),
    case(4, TWO_GROUPS, tp=4, packed=True),
    case(4, ONE_GROUP, tp=2, cp=2, context=HEADS_ZIGZAG, packed=True),
    case(4, with_model(num_groups=1, pattern="MM"), tp=4, recompute="full"),
    case(8, ONE_KEY_HEAD, tp=2, cp=2, pp=2, ep=2, microbatch_size=4, packed=True),
]


@cache
def reference(model: HybridConfig, packed: bool) -> Record:
    return plain_run(model, packed)


@cache
def verdict(case: Case) -> list[Verdict]:
    """What each rank found. A launch for each case: gloo's groups cost time while they live."""
    return launch(judge, case.world, case, reference(case.model, case.packed), timeout=240)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_the_same_model(case: Case) -> None:
    for rank in verdict(case):
        what, distance = max(rank.distances.items(), key=lambda pair: pair[1])
        assert distance < 1e-10, what
        compared = {name.split("[")[0] for name in rank.distances}
        assert {"loss", "norm", "parameters", "gradients"} <= compared
        assert f"loss[{STEPS - 1}]" in rank.distances


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_held_and_counted_once(case: Case) -> None:
    total: dict[str, int] = {}
    for rank in verdict(case):
        for name, count in rank.counted.items():
            total[name] = total.get(name, 0) + count
    model = HybridForCausalLM(case.model)
    assert total == {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_passes_what_runs(case: Case) -> None:
    layout = Layout(case.world, **dict(case.degrees))  # type: ignore[arg-type]
    sharding.check(case.model, layout, 24, case.context)


@pytest.mark.parametrize(
    ("changes", "degrees", "message"),
    [
        (
            {"pattern": "M", "num_groups": 3, "num_mamba_heads": 12},
            {"tp": 2},
            r"num_groups=3 cannot be split over tp=2; tp may be a divisor or a multiple of 3$",
        ),
        (
            {"pattern": "M", "num_mamba_heads": 12},
            {"tp": 8},
            r"num_mamba_heads=12 cannot be split over tp=8; tp may be 1, 2, 3, 4, 6, 12$",
        ),
        (
            {"pattern": "*", "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 6},
            {"tp": 4},
            "num_attention_heads=6 cannot be split over tp=4; tp may be 1, 2, 3, 6$",
        ),
        (
            {"pattern": "*", "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4},
            {"tp": 2},
            "num_key_value_heads=3 cannot be split over tp=2; tp may be a divisor or a multiple",
        ),
        ({"pattern": "-", "intermediate_size": 6}, {"tp": 4}, "intermediate_size=6 cannot"),
        ({"pattern": "E", "num_experts": 12}, {"ep": 8}, "num_experts=12 cannot be split over ep"),
        ({"pattern": "E", "expert_intermediate_size": 6}, {"etp": 4}, "etp may be 1, 2, 3, 6$"),
        ({"pattern": "E", "shared_intermediate_size": 6}, {"tp": 4}, "shared_intermediate_size=6"),
        (
            {"num_groups": 8},
            {"tp": 2, "cp": 4},
            r"sequence_length=36 cannot be split over tp\*cp=8",
        ),
    ],
)
def test_check_names_what_does_not_fit(
    changes: dict[str, Any], degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(HybridConfigError, match=message):
        length = 36 if "cp" in degrees else 24
        sharding.check(with_model(**changes), Layout(8, **degrees), length)


def test_check_knows_how_states_and_heads_cross_ranks() -> None:
    with pytest.raises(HybridConfigError, match=r"num_groups of a tensor rank=4 .* cp=3; cp may"):
        sharding.check(with_model(num_mamba_heads=12, pattern="M"), Layout(3, cp=3), 24, HEADS)
    with pytest.raises(
        HybridConfigError, match=r"stretches of 2 tokens over cp=4 .* back 3; .* 24"
    ):
        sharding.check(MODEL, Layout(4, cp=4), 16, STATES_ZIGZAG)


def test_check_stages() -> None:
    sharding.check_stages(MODEL, 7)
    with pytest.raises(HybridConfigError, match=r"7 layers of 'M-ME.EM' cannot fill 8 pipeline"):
        sharding.check_stages(MODEL, 8)
