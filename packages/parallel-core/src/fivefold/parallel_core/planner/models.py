"""What a model is to the planner: widths, and the parts that each layer is made of."""

from dataclasses import dataclass
from typing import Literal

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError

Part = Literal["attention", "mlp", "moe", "mamba"]
PARTS: dict[str, tuple[Part, ...]] = {
    "T": ("attention", "mlp"),
    "E": ("attention", "moe"),
    "X": ("moe",),
    "M": ("mamba",),
    "*": ("attention",),
    "-": ("mlp",),
}
"""Letters of a pattern: a dense block, a block of experts, and layers of one part alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts(Config):
    """Experts of a layer.

    Attributes:
        num_experts: routed ones.
        top_k: that each token goes to.
        ffn: inner width of one.
        shared_ffn: inner width of the expert that all tokens go to; 0 is none.
        shared_gate: that expert's output is weighed by each token.
        score: how a router's logits become scores.
        normalize: the weights of a token's experts are made to sum to 1.
        capacity: every expert gets as many rows from every rank, this factor over the mean; None
            leaves the rows as the routing has them.
    """

    num_experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    capacity: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k={self.top_k}; legal: 1 to num_experts={self.num_experts}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba(Config):
    """A Mamba-2 mixer (arXiv 2405.21060).

    Attributes:
        num_heads, head_dim: of the inner width, their product.
        state: width of the state of a head.
        num_groups: that share B and C.
        window: of the convolution, in tokens.
        chunk: tokens that are mixed by products of matrices.
    """

    num_heads: int
    head_dim: int = 64
    state: int = 128
    num_groups: int = 8
    window: int = 4
    chunk: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape(Config):
    """A decoder.

    Attributes:
        name: for reports.
        hidden: width between layers.
        num_layers: number of layers.
        num_heads: of queries.
        vocabulary: number of tokens, as padded.
        num_kv_heads: of keys and values; None is ``num_heads``.
        head_dim: None is ``hidden / num_heads``.
        ffn: inner width of a dense MLP; None is ``4 * hidden``.
        gated: the MLP, and each expert, has a gate (SwiGLU).
        bias: linears have one.
        qkv_bias: those of queries, keys and values have one.
        norm_vectors: parameters of a norm, in units of ``hidden``: 2 LayerNorm, 1 RMSNorm.
        dropout: masks and dropped probabilities are kept (the block of arXiv 2205.05198).
        fused_attention: scores are never stored, but a float32 log-sum-exp of each query is.
        tied: the head is the embedding.
        positions: learned positions; 0 is none.
        rotate: queries and keys are turned by their positions; None is where none are learned.
        qk_norm: queries and keys are normalised, each head by itself.
        pattern: a letter of ``PARTS`` for each layer; None is "T", or "E" with experts.
        experts: of layers "E".
        mamba: of layers "M".
    """

    name: str
    hidden: int
    num_layers: int
    num_heads: int
    vocabulary: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    gated: bool = False
    bias: bool = False
    qkv_bias: bool = False
    norm_vectors: int = 1
    dropout: bool = False
    fused_attention: bool = True
    tied: bool = False
    positions: int = 0
    rotate: bool | None = None
    qk_norm: bool = False
    pattern: str | None = None
    experts: Experts | None = None
    mamba: Mamba | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "num_layers", "num_heads", "vocabulary"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.hidden % self.num_heads:
            raise ConfigError(
                f"hidden={self.hidden} is not a multiple of num_heads={self.num_heads}; give "
                "head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.layers
        unknown = sorted(set(layers) - set(PARTS))
        if len(layers) != self.num_layers or unknown:
            raise ConfigError(
                f"pattern {layers!r} has {len(layers)} letters for num_layers={self.num_layers}; "
                f"legal letters: {', '.join(PARTS)}"
            )
        for letter, name in (("E", "experts"), ("X", "experts"), ("M", "mamba")):
            if letter in layers and getattr(self, name) is None:
                raise ConfigError(f"pattern {layers!r} has layers {letter!r} but no {name}")

    @property
    def layers(self) -> str:
        """A letter of ``PARTS`` for each layer."""
        if self.pattern is not None:
            return self.pattern
        return ("E" if self.experts else "T") * self.num_layers

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their positions."""
        return not self.positions if self.rotate is None else self.rotate

    @property
    def kv_heads(self) -> int:
        """Heads of keys, as many as of values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def inner(self) -> int:
        """Inner width of a dense MLP."""
        return self.ffn or 4 * self.hidden
