"""A small decoder of plain modules, with every seam and kind of parameter that parallelism meets.

Legend: B sequences, S tokens of a sequence here, T keys, H hidden width, V vocabulary, E experts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.collectives import all_gather_v, reduce_scatter_v
from fivefold.parallel_core.documents import Documents
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.losses import CrossEntropy, SideOutputs
from fivefold.parallel_core.parameters import ParameterTable, Placement
from fivefold.parallel_core.sequence_split import ContextConfig
from fivefold.parallel_core.styles import (
    ColumnParallel,
    ContextPositions,
    Plan,
    Replicate,
    RowParallel,
    SplitContext,
    Style,
    VocabParallel,
    VocabParallelLoss,
    shard_parameter,
)
from fivefold.parallel_core.topology import Axis

HEAD, TAIL = ("embed_tokens",), ("norm", "lm_head")


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Sizes; the vocabulary and the expert width are odd on purpose."""

    vocab_size: int = 37
    hidden_size: int = 12
    num_layers: int = 2
    num_heads: int = 4
    num_key_heads: int = 4
    width: int = 8
    num_experts: int = 0
    bias: bool = True
    tied: bool = False
    label_smoothing: float = 0.0


class Positions(nn.Module):
    def forward(self, length: int) -> Tensor:
        return torch.arange(length)


class Core(nn.Module):
    """Causal attention of a few lines; (B, S, heads, D) queries over (B, T, heads, D) keys."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_start: int | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        if documents is not None:
            return documents.attend(self.partial, q, k, v)
        # Not by `partial`: what its log-sum-exp keeps would be weighed, and nobody needs it here.
        first = k.shape[1] - q.shape[1] if query_start is None else query_start
        return self._attend(self._scores(q, k, first), v)

    def partial(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, offset)
        return self._attend(scores, v), scores.logsumexp(-1).transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, offset: int) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
        ahead = torch.arange(k.shape[1]) > offset + torch.arange(q.shape[1]).unsqueeze(1)
        return scores.masked_fill(ahead, -torch.inf)

    def _attend(self, scores: Tensor, v: Tensor) -> Tensor:
        v = v.repeat_interleave(scores.shape[1] // v.shape[2], 2)
        return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


class Attention(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        hidden, bias = config.hidden_size, config.bias
        self.head_dim = hidden // config.num_heads
        keys = config.num_key_heads * self.head_dim
        widths = {"q_proj": hidden, "k_proj": keys, "v_proj": keys}
        self.qkv = LinearGroup({n: nn.Linear(hidden, w, bias=bias) for n, w in widths.items()})
        self.core = Core()
        self.o_proj = nn.Linear(hidden, hidden, bias=bias)

    def forward(
        self, x_bsh: Tensor, positions: nn.Module, documents: Documents | None = None
    ) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_bsh))
        where, more = positions(q.shape[1]), {}
        if documents is not None:
            where, more = documents.positions(where), {"documents": documents}
        phase = where.to(q.dtype)[..., None, None] + torch.arange(self.head_dim)
        q, k = q * (1 + phase.cos() / 2).to(q.dtype), k * (1 + phase.sin() / 2).to(k.dtype)
        return self.o_proj(self.core(q, k, v, **more).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.width
        names = ("gate_proj", "up_proj")
        self.gate_up = LinearGroup({name: nn.Linear(hidden, width, bias=False) for name in names})
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        gate, up = self.gate_up(x_bsh)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Every expert sees every token, and what they say is summed."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.width))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.width, config.hidden_size))

    def mix(self, x_nh: Tensor) -> Tensor:
        """What the experts that are here add for tokens (N, H)."""
        inside = torch.tanh(torch.einsum("nh,ehf->enf", x_nh, self.up))
        return torch.einsum("enf,efh->nh", inside, self.down)

    def forward(self, x_bsh: Tensor) -> Tensor:
        return self.mix(x_bsh.flatten(0, 1)).view_as(x_bsh).clone()


class FoldedExperts(Experts):
    """Experts over "ep" and "etp": tokens of all these ranks come here, and sums go back."""

    axis: Axis

    def forward(self, x_bsh: Tensor) -> Tensor:
        x_nh = x_bsh.flatten(0, 1)
        sizes = [x_nh.shape[0]] * self.axis.size
        y_nh = self.mix(all_gather_v(x_nh, sizes, self.axis))
        return reduce_scatter_v(y_nh, sizes, self.axis).view_as(x_bsh).clone()


@dataclass(frozen=True)
class ExpertParallel(Style):
    data: str = "edp"

    def apply(self, module: nn.Module, name: str, table: ParameterTable) -> nn.Module:
        self._expect(module, name, Experts)
        for parameter, width in (("up", 2), ("down", 1)):
            shape = tuple(module.get_parameter(parameter).shape)
            placement = Placement(shape=shape, sharded=((0, "ep"), (width, "etp")), data=self.data)
            shard_parameter(module, name, parameter, table, placement)
        module.__class__ = FoldedExperts
        module.axis = table.topology.axis("etp-ep")
        return module


class Block(nn.Module):
    def __init__(self, config: ToyConfig, side: SideOutputs):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)
        self.experts = Experts(config) if config.num_experts else None
        self.side = side

    def forward(
        self, x_bsh: Tensor, positions: nn.Module, documents: Documents | None = None
    ) -> Tensor:
        x_bsh = x_bsh + self.attention(self.attention_norm(x_bsh), positions, documents)
        y_bsh = self.mlp_norm(x_bsh)
        x_bsh = x_bsh + self.mlp(y_bsh)
        if self.experts is None:
            return x_bsh
        y_bsh = self.experts(y_bsh)
        return x_bsh + self.side.loss("square", y_bsh.square().sum(), y_bsh)


class Toy(nn.Module):
    """Ids (B, S) to logits (B, S, V); a pipeline stage reads or gives hidden states."""

    recompute_regions: ClassVar = {"attention_core": "layers.*.attention.core", "layer": "layers.*"}

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.side = SideOutputs()
        self.positions = Positions()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = {str(i): Block(config, self.side) for i in range(config.num_layers)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = CrossEntropy(label_smoothing=config.label_smoothing)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor, document_starts: Tensor | None = None) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        documents = None if document_starts is None else Documents(document_starts)
        for layer in self.layers.values():
            x = layer(x, self.positions, documents)
        if self.norm is not None:
            x = self.lm_head(self.norm(x))
        return x


def rule(name: str) -> tuple[str, float]:
    """How a parameter of the toy starts."""
    if "norm" in name and name.endswith("weight"):
        return "ones", 0.0
    return "normal", 0.3


def plan(
    config: ToyConfig, *, sequence: bool = True, context: ContextConfig | None = None
) -> dict[str, Style]:
    """The whole plan; entries may be replaced, to see what they are good for."""
    context = ContextConfig() if context is None else context
    key_heads = {"k_proj": config.num_key_heads, "v_proj": config.num_key_heads}
    styles: dict[str, Style] = {
        "embed_tokens": VocabParallel(sequence),
        "positions": ContextPositions(context.split),
        "layers.*.attention_norm": Replicate(sequence),
        "layers.*.attention.qkv": ColumnParallel(sequence, heads=key_heads),
        "layers.*.attention.core": SplitContext(context.attention, context.split),
        "layers.*.attention.o_proj": RowParallel(sequence),
        "layers.*.mlp_norm": Replicate(sequence),
        "layers.*.mlp.gate_up": ColumnParallel(sequence),
        "layers.*.mlp.down": RowParallel(sequence),
        "norm": Replicate(sequence),
        "lm_head": VocabParallel(sequence),
        "loss": VocabParallelLoss(config.vocab_size),
    }
    if config.num_experts:
        styles["layers.*.experts"] = ExpertParallel()
    return styles


def changed(plan: Plan, changes: Mapping[str, Style]) -> dict[str, Style]:
    """A plan with some of its entries replaced."""
    return {**plan, **changes}


def resized(config: ToyConfig, **sizes: int | bool | float) -> ToyConfig:
    """A configuration with other sizes."""
    return dataclasses.replace(config, **sizes)
