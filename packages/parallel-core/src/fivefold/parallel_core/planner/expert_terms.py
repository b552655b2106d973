"""What autograd keeps of a layer of experts, in the names and bytes of this project's layers.

Legend: r tokens of this rank, E experts, K experts per token, H hidden width, w bytes of an element
of the router, which computes in float32 or wider.
"""

from math import ceil
from typing import NamedTuple

from fivefold.parallel_core.planner.local import Local, Terms
from fivefold.parallel_core.planner.models import Experts, ModelShape

INDEX = 8
"""Bytes of an index."""


class Rows(NamedTuple):
    """Copies of tokens.

    Attributes:
        sent: that this rank makes for the experts, padding included.
        arrived: at this rank's experts.
    """

    sent: int
    arrived: int


def rows_of(local: Local, experts: Experts) -> Rows:
    """Copies at a rank: padded they are the same on all, else the busiest has ``imbalance``."""
    copies = local.rows * experts.top_k
    if experts.capacity is None:
        return Rows(copies, round(copies * local.imbalance * local.etp))
    each = ceil(copies * experts.capacity / experts.num_experts)
    sent = each * experts.num_experts
    return Rows(sent, sent * local.etp)


def moe_terms(model: ModelShape, local: Local) -> Terms:
    """Router, dispatcher, experts and what is shared; nothing for a model without experts."""
    experts = model.experts
    if experts is None:
        return {}
    e, h, rows = local.element_size, model.hidden, rows_of(local, experts)
    inner = e * rows.arrived * (experts.ffn // local.etp)
    terms = _router(model, local, experts) | _dispatcher(local, experts, rows)
    terms["experts.input"] = e * rows.arrived * h
    terms["experts.offsets"] = 4 * (experts.num_experts // local.ep)
    terms["experts.activation.input"] = (2 if model.gated else 1) * inner
    terms["experts.down.input"] = inner
    terms["dispatcher.combined"] = e * rows.sent * h
    terms["dispatcher.weights"] = e * local.rows * experts.top_k
    return terms | (_shared(model, local, experts) if experts.shared_ffn else {})


def _router(model: ModelShape, local: Local, experts: Experts) -> Terms:
    w, r, h = max(4, local.element_size), local.rows, model.hidden
    terms = {"router.input": w * r * h}
    if local.element_size < w:
        terms["router.weight"] = w * experts.num_experts * h
    terms["router.scores"] = w * r * experts.num_experts
    terms["router.order"] = INDEX * r * experts.num_experts
    if experts.normalize:
        # Of the weights and, where the scores are no shares yet, of the balance loss.
        terms["router.sums"] = (2 if experts.score == "sigmoid" else 1) * w * r
        terms["router.chosen"] = w * r * experts.top_k
    elif experts.score == "sigmoid":
        terms["router.sums"] = w * r
    terms["router.balance"] = w * local.microbatch * experts.num_experts
    return terms


def _dispatcher(local: Local, experts: Experts, rows: Rows) -> Terms:
    """Where each copy went, there and back, and again where rows arrive from other ranks."""
    padding = 0 if experts.capacity is None else 1
    order = rows.sent + padding + local.rows * experts.top_k
    terms = {"dispatcher.order": INDEX * order}
    if local.ep * local.etp > 1:
        terms["dispatcher.arrival"] = 2 * INDEX * rows.arrived
    return terms


def _shared(model: ModelShape, local: Local, experts: Experts) -> Terms:
    e, h = local.element_size, model.hidden
    inner = e * local.tokens * (experts.shared_ffn // local.tp)
    terms = {
        # In float32 it is the router's input too.
        "shared.input": e * local.rows * h if e < 4 else 0,
        "shared.activation.input": (2 if model.gated else 1) * inner,
        "shared.down.input": inner,
    }
    if experts.shared_gate:
        terms["shared.gate"] = e * local.rows
        terms["shared.output"] = e * local.rows * h
    return terms
