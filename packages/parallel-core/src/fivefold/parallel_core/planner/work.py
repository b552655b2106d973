"""What the parts of a layer compute: products of matrices, and bytes that other kernels move.

Bytes are of kernels that are fused as arXiv 2205.05198's are: bias, dropout and sum in one, bias
and activation in one, a masked softmax in one. Legend: n tokens inside tensor-parallel layers, r
rows between them, e bytes of an element, h hidden.
"""

from dataclasses import dataclass

from fivefold.parallel_core.planner.kernels import Gemm
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import ModelShape, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one part of a layer for one microbatch on one rank.

    Attributes:
        into: the products of a column-parallel linear, whose backward can hide messages.
        others: all other products but those of the core.
        forward_bytes, backward_bytes: that kernels without products read and write.
        core: products of attention where scores are stored, or of the scan.
        core_forward_bytes, core_backward_bytes: of the core's other kernels; what is recomputed
            with the core.
        fused_flops: forward FLOPs of a fused attention.
    """

    into: tuple[Gemm, ...] = ()
    others: tuple[Gemm, ...] = ()
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    core: tuple[Gemm, ...] = ()
    core_forward_bytes: float = 0.0
    core_backward_bytes: float = 0.0
    fused_flops: float = 0.0


def part_work(model: ModelShape, local: Local, part: Part) -> Work:
    """The work of a part."""
    if part == "attention":
        return _attention(model, local)
    if part == "mlp":
        return _mlp(model, local)
    return _moe(model, local) if part == "moe" else _mamba(model, local)


def _around(model: ModelShape, local: Local) -> tuple[float, float]:
    """Norm before a part, and dropout and sum after it: forward and backward bytes."""
    size = local.rows * model.hidden
    e, mask = local.element_size, 1 if model.dropout else 0
    dropped = 2 * e + mask if model.dropout else 0
    # Norm: read, write; sum: read two, write. Backward reads the norm's input too.
    return size * (2 * e + 3 * e + mask), size * (3 * e + 3 * e + dropped)


def _attention(model: ModelShape, local: Local) -> Work:
    e, n, h = local.element_size, local.tokens, model.hidden
    heads, kv = model.num_heads // local.tp, max(1, model.kv_heads // local.tp)
    width = model.head_width
    forward, backward = _around(model, local)
    if model.rotary:
        turned = 2 * e * n * (heads + kv) * width  # queries and keys
        forward, backward = forward + turned, backward + turned
    work = {
        "into": (Gemm(n, (heads + 2 * kv) * width, h),),
        "others": (Gemm(n, h, heads * width),),
        "forward_bytes": forward,
        "backward_bytes": backward,
    }
    if model.fused_attention:
        flops = 2 * n * local.length * heads * width  # what the mask hides is not computed
        return Work(**work, fused_flops=flops)  # type: ignore[arg-type]
    scores = n * local.length * heads
    dropped = 2 * e + 1 if model.dropout else 0
    # Softmax: read, write; its backward reads two and writes one.
    return Work(
        **work,  # type: ignore[arg-type]
        core=(
            Gemm(local.length, local.length, width, n / local.length * heads),
            Gemm(local.length, width, local.length, n / local.length * heads),
        ),
        core_forward_bytes=scores * (2 * e + dropped),
        core_backward_bytes=scores * (3 * e + dropped),
    )


def _acted(model: ModelShape, local: Local, size: float) -> tuple[float, float]:
    """Bytes of an activation whose output has ``size`` elements."""
    e = local.element_size
    return (3 * e * size, 5 * e * size) if model.gated else (2 * e * size, 3 * e * size)


def _mlp(model: ModelShape, local: Local) -> Work:
    n, inner = local.tokens, model.inner // local.tp
    up = 2 if model.gated else 1
    forward, backward = _around(model, local)
    acted = _acted(model, local, n * inner)
    return Work(
        into=(Gemm(n, up * inner, model.hidden),),
        others=(Gemm(n, model.hidden, inner),),
        forward_bytes=forward + acted[0],
        backward_bytes=backward + acted[1],
    )


def _moe(model: ModelShape, local: Local) -> Work:
    experts = model.experts
    if experts is None:
        return Work()
    h, e, rows = model.hidden, local.element_size, local.rows
    sent = rows * experts.top_k
    arrived = sent * local.imbalance * local.etp
    held, ffn = experts.num_experts // local.ep, experts.ffn // local.etp
    shared, up = experts.shared_ffn // local.tp, 2 if model.gated else 1
    forward, backward = _around(model, local)
    acted = _acted(model, local, arrived * ffn + local.tokens * shared)
    # Rows are copied by expert at the sender and at the receiver, there and back; the router's
    # probabilities are float32.
    moved = 2 * e * h * (2 * sent + 2 * arrived) + 6 * 4 * rows * experts.num_experts
    each = arrived / held
    return Work(
        into=(Gemm(local.tokens, up * shared, h),),
        others=(
            Gemm(rows, experts.num_experts, h),
            Gemm(each, up * ffn, h, held),
            Gemm(each, h, ffn, held),
            Gemm(local.tokens, h, shared),
        ),
        forward_bytes=forward + acted[0] + moved,
        backward_bytes=backward + acted[1] + moved,
    )


def _mamba(model: ModelShape, local: Local) -> Work:
    mamba = model.mamba
    if mamba is None:
        return Work()
    e, n = local.element_size, local.tokens
    heads, groups = mamba.num_heads // local.tp, max(1, mamba.num_groups // local.tp)
    inner, chunks = heads * mamba.head_dim, n / mamba.chunk
    mixed = inner + 2 * groups * mamba.state
    forward, backward = _around(model, local)
    # Convolution and gated norm: read and write; the scan reads and writes and keeps its states.
    moved = e * n * (4 * mixed + 4 * inner) + 2 * 4 * chunks * inner * mamba.state
    c, state, width = mamba.chunk, mamba.state, mamba.head_dim
    return Work(
        into=(Gemm(n, inner + mixed + heads, model.hidden),),
        others=(Gemm(n, model.hidden, inner),),
        forward_bytes=forward + moved,
        backward_bytes=backward + 2 * moved,
        core=(
            Gemm(c, c, state, chunks * groups),
            Gemm(c, width, c, chunks * heads),
            Gemm(state, width, c, chunks * heads),
            Gemm(c, width, state, chunks * heads),
        ),
    )
