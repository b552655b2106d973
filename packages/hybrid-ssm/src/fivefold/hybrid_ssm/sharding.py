"""How the model lies over the ranks: one line for each kind of module.

Mamba-2 is split over "tp" by heads (see ``groups``), attention by heads, MLPs by width, experts
over (etp, ep, edp, pp). Between the layers the sequence is split over tp and cp (sequence
parallelism), so each rank's tokens are its own. Within a Mamba layer "cp" either exchanges tokens
for heads or lets states pass.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fivefold.hybrid_ssm.blocks.mamba import MambaCore
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.context import HeadsMamba, StatesMamba
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.groups import HeadsParallel
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, MAMBA, MLP
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.sequence_split import ContextConfig, Split, check_split, num_pieces
from fivefold.parallel_core.styles import (
    ColumnParallel,
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

MambaForm = Literal["states", "heads"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridContextConfig(Config):
    """How layers cross a sequence that is split over "cp".

    Attributes:
        attention: "gather" collects all keys and values, "ring" passes them round, "heads"
            exchanges tokens for heads.
        mamba: "states" lets states pass, "heads" exchanges tokens for heads.
        split: how the sequence is split; see ``parallel_core.sequence_split``.
    """

    attention: Literal["gather", "ring", "heads"] = "gather"
    mamba: MambaForm = "states"
    split: Split = "contiguous"

    @property
    def of_attention(self) -> ContextConfig:
        """The part that attention knows."""
        return ContextConfig(attention=self.attention, split=self.split)


@dataclass(frozen=True)
class SplitScan(Style):
    """Convolution and scan over a sequence that is split over "cp"."""

    form: MambaForm = "states"
    split: Split = "contiguous"
    axis: str = "cp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the core of a Mamba layer; other layers' cores stay."""
        axis = table.topology.axis(self.axis)
        if axis.size == 1:
            return module
        if isinstance(module, MambaCore):
            kind = StatesMamba if self.form == "states" else HeadsMamba
            return kind(module.rules, axis, self.split)
        return module


@dataclass(frozen=True)
class MixerCore(Style):
    """The seam of Mamba and attention layers, which bears one name in both."""

    context: HybridContextConfig

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap by the kind of layer."""
        if isinstance(module, MambaCore):
            return SplitScan(self.context.mamba, self.context.split).apply(module, name, table)
        return SplitContext(self.context.attention, self.context.split).apply(module, name, table)


@dataclass(frozen=True)
class ExpertParallel(Style):
    """Experts over "ep", the width of each over "etp"; their data axis is "edp"."""

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Cut ``up`` (E, F, I) and ``down`` (E, I, F)."""
        for parameter, width in (("up", 1), ("down", 2)):
            shape = tuple(module.get_parameter(parameter).shape)
            placement = Placement(shape=shape, sharded=((0, "ep"), (width, "etp")), data="edp")
            shard_parameter(module, name, parameter, table, placement)
        return module


@dataclass(frozen=True)
class FoldedDispatch(Style):
    """The dispatcher that sends token copies to the experts' ranks."""

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        """Swap the dispatcher."""
        # Here and not above: fivefold-moe is an extra, which a plan without experts does not need.
        from fivefold.hybrid_ssm.blocks.experts import folded_dispatcher

        return folded_dispatcher(module, table.topology)


def plan(config: HybridConfig, context: HybridContextConfig | None = None) -> Plan:
    """The plan of a hybrid; it names only what the pattern has.

    Args:
        config: the model's.
        context: how layers cross a split sequence.
    """
    context = HybridContextConfig() if context is None else context
    lines: dict[str, Style] = {
        "embed_tokens": VocabParallel(),
        "layers.*.norm": Replicate(),
        "norm": Replicate(),
        "lm_head": VocabParallel(),
        "loss": VocabParallelLoss(config.vocab_size),
    }
    mixer = "layers.*.mixer."
    if MAMBA in config.pattern or ATTENTION in config.pattern:
        lines[f"{mixer}core"] = MixerCore(context)
    if MAMBA in config.pattern:
        lines |= {
            f"{mixer}in_proj": ColumnParallel(heads=dict.fromkeys("bc", config.num_groups)),
            f"{mixer}heads": HeadsParallel(config.num_groups),
            f"{mixer}norm": HeadsParallel(config.num_groups),
            f"{mixer}out_proj": RowParallel(),
        }
    if ATTENTION in config.pattern:
        heads = dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads)
        lines |= {
            f"{mixer}qkv": ColumnParallel(heads=heads),
            f"{mixer}o_proj": RowParallel(),
        }
    if MLP in config.pattern:
        lines |= {f"{mixer}up_proj": ColumnParallel(), f"{mixer}down_proj": RowParallel()}
    if EXPERTS in config.pattern:
        lines |= _experts(config, mixer)
    return lines


def _experts(config: HybridConfig, mixer: str) -> dict[str, Style]:
    lines: dict[str, Style] = {
        f"{mixer}router": Replicate(),
        f"{mixer}router.sequence_total": SumOver("tp-cp"),
        f"{mixer}dispatcher": FoldedDispatch(),
        f"{mixer}experts": ExpertParallel(),
        f"{mixer}shared.up_proj": ColumnParallel(),
        f"{mixer}shared.down_proj": RowParallel(),
    }
    if config.latent_size is not None:
        lines |= {f"{mixer}latent_in": Replicate(), f"{mixer}latent_out": Replicate()}
    return lines


def check(
    config: HybridConfig,
    layout: Layout,
    sequence_length: int | None = None,
    context: HybridContextConfig | None = None,
) -> None:
    """Check that a model fits a layout, before anything is built.

    Raises:
        HybridConfigError: with the size that does not divide and what would.
        ConfigError: a sequence that cannot be split so.
    """
    context = HybridContextConfig() if context is None else context
    for name, size, axis, degree in _sizes(config, layout, sequence_length, context):
        if size % degree:
            legal = [d for d in range(1, size + 1) if size % d == 0]
            shown = ", ".join(map(str, legal[:12])) + (", ..." if len(legal) > 12 else "")
            raise HybridConfigError(
                f"{name}={size} cannot be split over {axis}={degree}; {axis} may be {shown}"
            )
    if ATTENTION in config.pattern:
        _check_shared("num_key_value_heads", config.num_key_value_heads, "tp", layout.tp)
        if context.attention == "heads":
            of_rank = max(config.num_key_value_heads // layout.tp, 1)
            _check_shared("num_key_value_heads of a tensor rank", of_rank, "cp", layout.cp)
    if MAMBA in config.pattern:
        _check_shared("num_groups", config.num_groups, "tp", layout.tp)
    if MAMBA in config.pattern and layout.cp > 1 and context.mamba == "heads":
        of_rank = max(config.num_groups // layout.tp, 1)
        _check_shared("num_groups of a tensor rank", of_rank, "cp", layout.cp)
    if sequence_length is not None:
        check_split(sequence_length, layout.cp, context.split)
        _check_stretches(config, layout, sequence_length, context)


def _sizes(
    config: HybridConfig,
    layout: Layout,
    sequence_length: int | None,
    context: HybridContextConfig,
) -> list[tuple[str, int, str, int]]:
    """What is split, into how many: name, size, axis, degree."""
    sizes = []
    if sequence_length is not None:
        sizes.append(("sequence_length", sequence_length, "tp*cp", layout.tp * layout.cp))
    if MAMBA in config.pattern:
        both = layout.tp * (layout.cp if context.mamba == "heads" else 1)
        axis = "tp" if both == layout.tp else "tp*cp"
        sizes.append(("num_mamba_heads", config.num_mamba_heads, axis, both))
    if ATTENTION in config.pattern:
        both = layout.tp * (layout.cp if context.attention == "heads" else 1)
        axis = "tp" if both == layout.tp else "tp*cp"
        sizes.append(("num_attention_heads", config.num_attention_heads, axis, both))
    if MLP in config.pattern:
        sizes.append(("intermediate_size", config.intermediate_size, "tp", layout.tp))
    if EXPERTS in config.pattern:
        sizes += [
            ("num_experts", config.num_experts, "ep", layout.ep),
            ("expert_intermediate_size", config.expert_intermediate_size, "etp", layout.etp),
            ("shared_intermediate_size", config.shared_intermediate_size, "tp", layout.tp),
        ]
    return sizes


def _check_shared(name: str, count: int, axis: str, degree: int) -> None:
    """Check that ranks get whole heads or groups, or copies of one."""
    if count % degree and degree % count:
        raise HybridConfigError(
            f"{name}={count} cannot be split over {axis}={degree}; {axis} may be a divisor or a "
            f"multiple of {count}"
        )


def _check_stretches(
    config: HybridConfig, layout: Layout, sequence_length: int, context: HybridContextConfig
) -> None:
    """Check that the convolution looks back no further than one stretch."""
    pieces = layout.cp * num_pieces(context.split)
    length, reach = sequence_length // pieces, config.conv_width - 1
    if layout.cp > 1 and MAMBA in config.pattern and context.mamba == "states" and length < reach:
        raise HybridConfigError(
            f"sequence_length={sequence_length} gives stretches of {length} tokens over "
            f"cp={layout.cp} ({context.split}), and the convolution looks back {reach}; use at "
            f"least {pieces * reach} tokens"
        )


def check_stages(config: HybridConfig, num_stages: int) -> None:
    """Check that every pipeline stage gets a layer.

    Raises:
        HybridConfigError: there are fewer layers than stages.
    """
    if config.num_layers < num_stages:
        raise HybridConfigError(
            f"the {config.num_layers} layers of {config.pattern!r} cannot fill {num_stages} "
            f"pipeline stages; use at most {config.num_layers} stages or more layers"
        )
