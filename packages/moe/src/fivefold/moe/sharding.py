"""How the model lies over the ranks: one line for each kind of module.

Attention is split over (tp, cp, dp, pp), experts over (etp, ep, edp, pp). Between the layers the
sequence is split over tp and cp (sequence parallelism), so each rank's tokens are its own.
"""

from dataclasses import dataclass, field

from torch import nn

from fivefold.moe.capacity import WholeSequences
from fivefold.moe.config import MoEConfig
from fivefold.moe.dispatch import TokenDispatcher
from fivefold.moe.dispatchers import DispatchConfig, folded_dispatcher
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.experts import Experts
from fivefold.moe.split_sequences import SplitSequences
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.sequence_split import ContextConfig, Split, check_split
from fivefold.parallel_core.styles import (
    ColumnParallel,
    ContextPositions,
    Plan,
    Replicate,
    RowParallel,
    SplitContext,
    Style,
    SumOver,
    VocabParallel,
    VocabParallelLoss,
    shard_parameter,
)

HEAD = ("embed_tokens",)
"""Modules of the first pipeline stage only."""

TAIL = ("norm", "lm_head")
"""Modules of the last pipeline stage only."""


@dataclass(frozen=True)
class ExpertParallel(Style):
    """Experts over "ep", the width of each over "etp"; their data axis is "edp"."""

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Cut ``gate_up`` (E, 2, F, H) and ``down`` (E, H, F)."""
        self._expect(module, name, Experts)
        for parameter, width in (("gate_up", 2), ("down", 2)):
            shape = tuple(module.get_parameter(parameter).shape)
            placement = Placement(shape=shape, sharded=((0, "ep"), (width, "etp")), data="edp")
            shard_parameter(module, name, parameter, table, placement)
        return module


@dataclass(frozen=True)
class Dispatch(Style):
    """The dispatcher that brings tokens to the experts' ranks.

    Attributes:
        config: which one.
    """

    config: DispatchConfig = field(default_factory=DispatchConfig)

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the dispatcher; the given one stays where every expert is whole on this rank."""
        self._expect(module, name, TokenDispatcher)
        return folded_dispatcher(module, table.topology, self.config)


@dataclass(frozen=True)
class AskSharers(Style):
    """Whole sequences for dropping where ranks hold parts of them.

    Attributes:
        split: which positions a rank of "cp" holds.
    """

    split: Split

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the seam."""
        self._expect(module, name, WholeSequences)
        if table.topology.size("tp-cp") == 1:
            return module
        return SplitSequences(table.topology, self.split)


def plan(
    config: MoEConfig,
    context: ContextConfig | None = None,
    dispatch: DispatchConfig | None = None,
) -> Plan:
    """The plan of a mixture-of-experts decoder.

    Args:
        config: the model's.
        context: how attention crosses a split sequence.
        dispatch: how tokens come to their experts.
    """
    context = ContextConfig() if context is None else context
    key_heads = dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads)
    dispatch = DispatchConfig() if dispatch is None else dispatch
    return {
        **_optional(config),
        "embed_tokens": VocabParallel(),
        "positions": ContextPositions(context.split),
        "layers.*.input_norm": Replicate(),
        "layers.*.attention.qkv": ColumnParallel(heads=key_heads),
        "layers.*.attention.core": SplitContext(context.attention, context.split),
        "layers.*.attention.o_proj": RowParallel(),
        "layers.*.mlp_norm": Replicate(),
        "layers.*.mlp.router": Replicate(),
        "layers.*.mlp.router.sequence_total": SumOver("tp-cp"),
        "layers.*.mlp.capacity.sequences": AskSharers(context.split),
        "layers.*.mlp.dispatcher": Dispatch(dispatch),
        "layers.*.mlp.experts": ExpertParallel(),
        "norm": Replicate(),
        "lm_head": VocabParallel(),
        "loss": VocabParallelLoss(config.vocab_size),
    }


def _optional(config: MoEConfig) -> Plan:
    """The plan of what some models have."""
    parts: dict[str, Style] = {}
    networks = ["layers.*.mlp"] * bool(config.dense_layers)
    networks += ["layers.*.mlp.shared"] * bool(config.shared_intermediate_size)
    for network in networks:
        parts[f"{network}.gate_up"] = ColumnParallel()
        parts[f"{network}.down"] = RowParallel()
    if config.shared_gate:
        parts["layers.*.mlp.shared_gate"] = Replicate()
    if config.qk_norm:
        parts |= {f"layers.*.attention.{name}_norm": Replicate() for name in "qk"}
    return parts


def check(
    config: MoEConfig,
    layout: Layout,
    sequence_length: int | None = None,
    context: ContextConfig | None = None,
) -> None:
    """Check that a model fits a layout, before anything is built.

    Raises:
        MoEConfigError: with the size that does not divide and what would.
        ConfigError: a sequence that cannot be split so.
    """
    context = ContextConfig() if context is None else context
    sizes = [
        ("num_attention_heads", config.num_attention_heads, "tp", layout.tp),
        ("num_experts", config.num_experts, "ep", layout.ep),
        ("expert_intermediate_size", config.expert_intermediate_size, "etp", layout.etp),
        ("shared_intermediate_size", config.shared_intermediate_size, "tp", layout.tp),
        ("intermediate_size", config.intermediate_size, "tp", layout.tp),
    ]
    if sequence_length is not None:
        sizes.append(("sequence_length", sequence_length, "tp*cp", layout.tp * layout.cp))
        check_split(sequence_length, layout.cp, context.split)
    if context.attention == "heads" and layout.cp > 1:
        heads, degree = config.num_attention_heads, layout.tp * layout.cp
        sizes.append(("num_attention_heads", heads, "tp*cp", degree))
    for name, size, axis, degree in sizes:
        if size % degree:
            legal = [d for d in range(1, size + 1) if size % d == 0]
            shown = ", ".join(map(str, legal[:12])) + (", ..." if len(legal) > 12 else "")
            raise MoEConfigError(
                f"{name}={size} cannot be split over {axis}={degree}; {axis} may be {shown}"
            )
    _check_key_heads(config.num_key_value_heads, "tp", layout.tp)
    if context.attention == "heads":
        _check_key_heads(max(config.num_key_value_heads // layout.tp, 1), "cp", layout.cp)


def _check_key_heads(num_heads: int, axis: str, degree: int) -> None:
    """Check that ranks get whole key heads, or copies of one.

    Raises:
        MoEConfigError: neither of heads and ranks divides the other.
    """
    if num_heads % degree and degree % num_heads:
        each = "" if axis == "tp" else " of a tensor rank"
        raise MoEConfigError(
            f"num_key_value_heads={num_heads}{each} cannot be split over {axis}={degree}; {axis} "
            f"may be a divisor or a multiple of {num_heads}"
        )


def check_stages(config: MoEConfig, num_stages: int) -> None:
    """Check that every pipeline stage gets a layer.

    Raises:
        MoEConfigError: there are fewer layers than stages.
    """
    if config.num_layers < num_stages:
        raise MoEConfigError(
            f"num_layers={config.num_layers} cannot fill {num_stages} pipeline stages; use at "
            f"most {config.num_layers} stages or more layers"
        )
