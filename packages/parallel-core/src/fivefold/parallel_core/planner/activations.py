"""What autograd keeps of one layer for one microbatch, term by term (arXiv 2205.05198, section 4).

Names and bytes are those of ``ActivationLedger`` for the block of the paper. Legend: rows are
tokens of a microbatch on this rank, split over cp and, between tensor-parallel layers under
sequence parallelism, over tp too.
"""

from functools import lru_cache

from fivefold.parallel_core.planner.expert_terms import moe_terms
from fivefold.parallel_core.planner.local import Local, Terms
from fivefold.parallel_core.planner.models import PARTS, ModelShape


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
        terms[f"{name}.rsqrt"] = max(4, local.element_size) * local.rows
    return terms


def _attention(model: ModelShape, local: Local) -> Terms:
    e, n, t = local.element_size, local.tokens, local.tp
    heads = model.num_heads // t
    kv = max(1, model.kv_heads // t)  # fewer key heads than ranks are repeated
    width = model.head_width
    terms = _norm(model, local, "attention_norm")
    terms["attention.qkv.input"] = e * local.rows * model.hidden
    terms["attention.core.q"] = e * n * heads * width
    # The core gathers keys and values over cp; where it is recomputed they are its own part's.
    whole = local.cp if local.recompute == "none" else 1
    terms["attention.core.k"] = terms["attention.core.v"] = e * n * whole * kv * width
    if model.qk_norm:
        terms["attention.qk_norm.input"] = e * n * (heads + kv) * width
        terms["attention.qk_norm.rsqrt"] = max(4, e) * n * (heads + kv)
    if local.recompute == "none":
        terms |= _core(model, local, heads)
    terms["attention.o_proj.input"] = e * n * heads * width
    if model.dropout:
        terms["attention_dropout.native_dropout.1"] = local.rows * model.hidden
    return terms


def _core(model: ModelShape, local: Local, heads: int) -> Terms:
    if model.fused_attention:
        return {"attention.core.logsumexp": max(4, local.element_size) * local.tokens * heads}
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
    return _norm(model, local, "mlp_norm") | moe_terms(model, local)


def _mamba(model: ModelShape, local: Local) -> Terms:
    """Of a scan that makes its states again in backward, and a norm of groups behind a gate."""
    mamba = model.mamba
    if mamba is None:
        return {}
    e, n, t = local.element_size, local.tokens, local.tp
    heads, groups = mamba.num_heads // t, max(1, mamba.num_groups // t)
    inner = heads * mamba.head_dim
    mixed = inner + 2 * groups * mamba.state
    terms = _norm(model, local, "mamba_norm")
    terms["mamba.in_proj.input"] = e * local.rows * model.hidden
    terms["mamba.convolution.input"] = e * n * mixed
    terms["mamba.scan.steps"] = e * n * heads
    terms["mamba.decay"] = max(4, e) * heads
    if local.recompute == "none":
        terms["mamba.scan.input"] = e * n * mixed
        terms["mamba.scan.decay"] = max(4, e) * heads
    terms["mamba.gate"] = terms["mamba.norm.input"] = e * n * inner
    terms["mamba.norm.rsqrt"] = max(4, e) * n * groups
    if t > mamba.num_groups:
        # Ranks that share a group of the norm sum its squares between them, step by step.
        terms["mamba.norm.steps"] = 3 * e * n * inner
    terms["mamba.out_proj.input"] = e * n * inner
    return terms


_PARTS = {"attention": _attention, "mlp": _mlp, "moe": _moe, "mamba": _mamba}


def first_terms(model: ModelShape, local: Local) -> Terms:
    """What the embedding keeps: a mask (arXiv 2205.05198, section 4.3), or its ids."""
    if model.dropout:
        return {"embedding_dropout.native_dropout.1": local.rows * model.hidden}
    # Ids of this rank's rows, and which of them are another rank's.
    return {"embedding.ids": (8 + 1) * local.tokens}


def last_terms(model: ModelShape, local: Local) -> Terms:
    """What the last norm, the head and the loss keep."""
    e, columns = local.element_size, -(-model.vocabulary // local.tp)
    wide = max(4, e)
    terms = _norm(model, local, "final_norm")
    terms["head.input"] = e * local.rows * model.hidden
    if model.dropout:
        return terms | {"loss.logits": 4 * local.tokens * columns}
    if local.tp == 1:
        terms["loss.logits"] = e * local.tokens * columns
        return terms | {"loss.logsumexp": wide * local.tokens}
    # Exponentials of this rank's columns; targets, which are whose, and which of them count.
    return terms | {
        "loss.exp": wide * local.tokens * columns,
        "loss.targets": (8 + 1 + 1) * local.tokens,
    }


def target_bytes(model: ModelShape, local: Local, num_microbatches: int) -> int:
    """Of the ids that the loss keeps: a step's, of which each microbatch has a part.

    Where the head is split over ranks each microbatch makes its own, see ``last_terms``.
    """
    return 0 if model.dropout or local.tp > 1 else 8 * local.tokens * num_microbatches


def stage_terms(model: ModelShape, local: Local, letters: str) -> Terms:
    """What all layers of a stage keep together: the turns of rotary positions."""
    turned = {"T", "E", "*"} & set(letters)
    if not turned or not model.rotary or local.recompute == "full":
        return {}
    wide = max(4, local.element_size)
    return {"rotary": wide * (local.length // local.cp) * model.head_width}
