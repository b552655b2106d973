"""What autograd keeps of one layer for one microbatch, term by term (arXiv 2205.05198, section 4).

Names and bytes are those of ``ActivationLedger`` for the block of the paper. Legend: rows are
tokens of a microbatch on this rank, split over cp and, between tensor-parallel layers under
sequence parallelism, over tp too.
"""

from dataclasses import dataclass
from functools import lru_cache

from fivefold.parallel_core.planner.models import PARTS, ModelShape
from fivefold.parallel_core.planner.setup import Recompute, Setup

Terms = dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """The sizes that one layer's activations follow from.

    Attributes:
        microbatch: sequences.
        length: tokens of a whole sequence.
        tp, cp, ep, etp: sizes of the axes.
        sequence: split along the sequence between tensor-parallel layers.
        element_size: bytes of an activation.
        recompute: what is not kept.
        imbalance: rows of the busiest expert rank over the mean.
    """

    microbatch: int
    length: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence: bool
    element_size: int
    recompute: Recompute
    imbalance: float

    @classmethod
    def of(cls, setup: Setup) -> "Local":
        """The part of a setup that layers see."""
        return cls(**{name: getattr(setup, name) for name in cls.__dataclass_fields__})

    @property
    def tokens(self) -> int:
        """Rows inside tensor-parallel layers."""
        return self.microbatch * self.length // self.cp

    @property
    def rows(self) -> int:
        """Rows between tensor-parallel layers."""
        return self.tokens // self.tp if self.sequence else self.tokens


@lru_cache(maxsize=65536)
def layer_bytes(model: ModelShape, local: Local, letter: str) -> int:
    """Sum of ``layer_terms``."""
    return sum(layer_terms(model, local, letter).values())


def layer_terms(model: ModelShape, local: Local, letter: str) -> Terms:
    """Bytes of one layer for one microbatch.

    Args:
        model: whose layer it is.
        local: sizes on this rank.
        letter: kind of layer, of ``PARTS``.
    """
    if local.recompute == "full":
        return {"input": local.element_size * local.rows * model.hidden}
    terms: Terms = {}
    for part in PARTS[letter]:
        terms |= _PARTS[part](model, local)
    return {name: size for name, size in terms.items() if size}


def _norm(model: ModelShape, local: Local, name: str) -> Terms:
    """Input of a norm, its statistics, and its output, which is what the next linear keeps."""
    terms = {f"{name}.input": local.element_size * local.rows * model.hidden}
    if model.norm_vectors == 2:
        statistic = local.element_size * local.rows
        terms |= {f"{name}.native_layer_norm.{i}": statistic for i in (1, 2)}
    else:
        terms[f"{name}.rsqrt"] = 4 * local.rows
    return terms


def _attention(model: ModelShape, local: Local) -> Terms:
    e, n, t = local.element_size, local.tokens, local.tp
    heads = model.num_heads // t
    kv = max(1, model.kv_heads // t)  # fewer key heads than ranks are repeated
    width = model.head_width
    terms = _norm(model, local, "attention_norm")
    terms["attention.qkv.input"] = e * local.rows * model.hidden
    terms["attention.core.q"] = e * n * heads * width
    terms["attention.core.k"] = terms["attention.core.v"] = e * n * kv * width
    if local.recompute == "none":
        terms |= _core(model, local, heads)
    terms["attention.o_proj.input"] = e * n * heads * width
    if model.dropout:
        terms["attention_dropout.native_dropout.1"] = local.rows * model.hidden
    return terms


def _core(model: ModelShape, local: Local, heads: int) -> Terms:
    if model.fused_attention:
        return {"attention.core.logsumexp": 4 * local.tokens * heads}
    scores = heads * local.tokens * local.length
    terms = {"attention.core.softmax": local.element_size * scores}
    if model.dropout:
        terms["attention.core.native_dropout"] = local.element_size * scores
        terms["attention.core.native_dropout.1"] = scores
    return terms


def _mlp(model: ModelShape, local: Local) -> Terms:
    e = local.element_size
    inner = e * local.tokens * (model.inner // local.tp)
    terms = _norm(model, local, "mlp_norm")
    terms["up.input"] = e * local.rows * model.hidden
    terms["activation.input"] = inner * (2 if model.gated else 1)
    terms["down.input"] = inner
    if model.dropout:
        terms["mlp_dropout.native_dropout.1"] = local.rows * model.hidden
    return terms


def _moe(model: ModelShape, local: Local) -> Terms:
    """Rows that arrive at this rank's experts are kept, and what the experts make of them."""
    experts = model.experts
    if experts is None:
        return {}
    e, h = local.element_size, model.hidden
    sent = local.rows * experts.top_k
    arrived = int(sent * local.imbalance) * local.etp
    gate = 2 if model.gated else 1
    inner = e * arrived * (experts.ffn // local.etp)
    terms = _norm(model, local, "mlp_norm")
    terms["router.input"] = e * local.rows * h
    terms["router.probabilities"] = 4 * local.rows * experts.num_experts
    terms["dispatcher.permutation"] = 8 * sent
    terms["experts.input"] = e * arrived * h
    terms["experts.activation.input"] = gate * inner
    terms["experts.down.input"] = inner
    terms["dispatcher.combined"] = e * sent * h
    if experts.shared_ffn:
        shared = e * local.tokens * (experts.shared_ffn // local.tp)
        terms["shared.activation.input"] = gate * shared
        terms["shared.down.input"] = shared
    return terms


def _mamba(model: ModelShape, local: Local) -> Terms:
    """Of a fused scan: its inputs, and a state of each head at the start of each chunk."""
    mamba = model.mamba
    if mamba is None:
        return {}
    e, n, t = local.element_size, local.tokens, local.tp
    heads = mamba.num_heads // t
    inner = heads * mamba.head_dim
    mixed = inner + 2 * max(1, mamba.num_groups // t) * mamba.state
    terms = _norm(model, local, "mamba_norm")
    terms["mamba.in_proj.input"] = e * local.rows * model.hidden
    terms["mamba.convolution.input"] = terms["mamba.scan.input"] = e * n * mixed
    terms["mamba.scan.steps"] = 4 * n * heads
    terms["mamba.scan.states"] = 4 * -(-n // mamba.chunk) * inner * mamba.state
    terms["mamba.gate"] = terms["mamba.norm.input"] = e * n * inner
    terms["mamba.out_proj.input"] = e * n * inner
    return terms


_PARTS = {"attention": _attention, "mlp": _mlp, "moe": _moe, "mamba": _mamba}


def ends_terms(model: ModelShape, local: Local, first: bool, last: bool, held: int = 1) -> Terms:
    """What is kept outside of the layers (arXiv 2205.05198, section 4.3).

    Args:
        model: the model.
        local: sizes on this rank.
        first: this rank has the embedding.
        last: this rank has the head.
        held: microbatches in flight at the embedding.
    """
    e, h = local.element_size, model.hidden
    terms: Terms = {}
    if first and model.dropout:
        terms["embedding_dropout.native_dropout.1"] = local.rows * h * held
    if last:
        terms |= _norm(model, local, "final_norm")
        terms["head.input"] = e * local.rows * h
        terms["loss.logits"] = 4 * local.tokens * -(-model.vocabulary // local.tp)
    return terms
