"""How tokens choose their experts: the configuration of a router."""

from dataclasses import dataclass
from typing import Literal

from fivefold.moe.errors import MoEConfigError
from fivefold.parallel_core.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig(Config):
    """How tokens choose their experts, and what keeps the experts balanced.

    Attributes:
        score: "softmax" over all experts (GShard, arXiv 2006.16668), or "sigmoid" of each expert by
            itself (DeepSeek-V3, 2412.19437, equation 15).
        normalize: whether the weights of a token's experts are scaled to sum to 1. With "softmax"
            that is the softmax over the chosen experts only (Mixtral, 2401.04088): softmax after
            the choice instead of before it.
        scale: multiplied into the weights in the end.
        num_groups: experts lie in so many groups of consecutive ones, and a token uses the experts
            of only some groups (DeepSeek-V2, 2405.04434, section 2.2.2).
        groups_per_token: groups that a token may use.
        expert_bias: whether a bias is added to the scores for choosing, not for weighing, and moved
            after every step towards balance (2408.15664).
        bias_rate: how far the bias moves in a step.
        jitter: in training the router's input is multiplied by uniform noise from 1 - jitter to
            1 + jitter (Switch Transformer, 2101.03961, section 2.4).
        dtype: in which scores are computed; wider inputs stay wider.
        aux_loss_coef: weight of the balance loss of each sequence.
        global_loss_coef: weight of the balance loss over the global batch, whose counts are those
            of the step before.
        z_loss_coef: weight of the loss on large logits.

    Raises:
        MoEConfigError: a value is impossible; names it and what would be legal.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    expert_bias: bool = False
    bias_rate: float = 1e-3
    jitter: float = 0.0
    dtype: Literal["float32", "float64"] = "float32"
    aux_loss_coef: float = 0.01
    global_loss_coef: float = 0.0
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "scale": (self.scale > 0, "above 0"),
            "num_groups": (self.num_groups >= 1, "at least 1"),
            "groups_per_token": (
                1 <= self.groups_per_token <= self.num_groups,
                f"from 1 to num_groups {self.num_groups}",
            ),
            "bias_rate": (self.bias_rate >= 0, "at least 0"),
            "jitter": (0 <= self.jitter < 1, "at least 0 and below 1"),
            "aux_loss_coef": (self.aux_loss_coef >= 0, "at least 0"),
            "global_loss_coef": (self.global_loss_coef >= 0, "at least 0"),
            "z_loss_coef": (self.z_loss_coef >= 0, "at least 0"),
        }
        for name, (legal, rule) in rules.items():
            if not legal:
                raise MoEConfigError(f"router.{name} is {getattr(self, name)!r}; it must be {rule}")

    def check(self, num_experts: int, num_experts_per_token: int) -> None:
        """Check the numbers of experts.

        Raises:
            MoEConfigError: groups do not divide the experts, or hold too few for a token.
        """
        if num_experts % self.num_groups:
            raise MoEConfigError(
                f"num_experts {num_experts} is not a multiple of router.num_groups "
                f"{self.num_groups}"
            )
        reach = num_experts // self.num_groups * self.groups_per_token
        if num_experts_per_token > reach:
            raise MoEConfigError(
                f"num_experts_per_token is {num_experts_per_token}; the router.groups_per_token "
                f"{self.groups_per_token} of {self.num_groups} groups hold {reach} experts"
            )
        if self.num_groups > 1 and num_experts == self.num_groups:
            raise MoEConfigError(
                f"router.num_groups is {self.num_groups}, one for each expert; a group is scored "
                "by its two best experts, so it needs two"
            )
