"""``ssd_scan`` in C++, see cpu.cpp: a chunk of tokens after the other, heads of a group together.

Legend: B batch, S tokens, H heads, P values in a head, G groups, N values of state.
"""

# ruff: noqa: N803, N806 - the paper's names A, B, C and D

from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.op import Arguments, Gradients, Inputs, wide
from fivefold.hybrid_ssm.ops.ssd_scan.reference import step_sizes, step_sizes_backward
from fivefold.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")

# Tokens of a chunk, if nobody asks for more or fewer: what the caches hold best.
_CHUNK = 64
# Heads of a group that go together: more share the products of C and B, and more states need room.
_HEADS = 8


def refuses(name: str, *inputs: object) -> str | None:
    """Machines where the file cannot be compiled."""
    return native.refusal(SOURCE)


def ssd_scan_forward(*inputs: *Arguments) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    given = Inputs(*inputs)
    compute = wide(given.x.dtype)
    x, B, C = (_rows(each, compute) for each in (given.x, given.B, given.C))
    batch, _, num_heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    final_state = torch.empty((batch, num_heads, head_dim, B.shape[3]), dtype=compute)
    steps = step_sizes(given.dt, given.dt_bias, given.limits, compute)
    native.call(
        native.load(SOURCE).ssd_scan_forward,
        compute == torch.float64,
        _sizes(x, B, given.chunk_size),
        *_layouts(x, B, C),
        x,
        steps.contiguous(),
        _plain(given.A, compute),
        B,
        C,
        _plain(given.D, compute),
        _plain(given.initial_state, compute),
        None if given.documents is None else given.documents.contiguous(),
        y,
        final_state,
        torch.get_num_threads(),
    )
    return y, final_state


def ssd_scan_backward(dy: Tensor, dfinal_state: Tensor | None, *inputs: *Arguments) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    given = Inputs(*inputs)
    compute, D, initial_state = wide(given.x.dtype), given.D, given.initial_state
    dy, x, B, C = (_rows(each, compute) for each in (dy, given.x, given.B, given.C))
    batch, num_tokens, num_heads, _ = x.shape
    sizes = _sizes(x, B, given.chunk_size)
    blocks = -(-num_heads // B.shape[2] // int(sizes[7]))
    steps = step_sizes(given.dt, given.dt_bias, given.limits, compute)
    dx = torch.empty(x.shape, dtype=given.x.dtype)
    dsteps = torch.empty((batch, num_tokens, num_heads), dtype=compute)
    # Not views of common memory: results of an op may not be.
    dA_bh, dD_bh = (torch.empty((batch, num_heads), dtype=compute) for _ in range(2))
    dB, dC = (torch.empty((blocks, *B.shape), dtype=compute) for _ in range(2))
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=compute)
    native.call(
        native.load(SOURCE).ssd_scan_backward,
        compute == torch.float64,
        sizes,
        *_layouts(x, B, C, dy),
        dy,
        _plain(dfinal_state, compute),
        x,
        steps.contiguous(),
        _plain(given.A, compute),
        B,
        C,
        _plain(given.D, compute),
        _plain(given.initial_state, compute),
        None if given.documents is None else given.documents.contiguous(),
        dx,
        dsteps,
        dA_bh,
        dB,
        dC,
        dD_bh,
        dinitial,
        torch.get_num_threads(),
    )
    ddt, ddt_bias = step_sizes_backward(dsteps, given.dt, given.dt_bias, given.limits)
    return (
        dx,
        ddt,
        dA_bh.sum(0).to(given.A.dtype),
        _total(dB).to(given.B.dtype),
        _total(dC).to(given.C.dtype),
        x.new_empty(0) if D is None else dD_bh.sum(0).to(D.dtype),
        ddt_bias,
        x.new_empty(0)
        if initial_state is None or dinitial is None
        else dinitial.to(initial_state.dtype),
    )


def _sizes(x: Tensor, B: Tensor, chunk_size: int) -> Tensor:
    """What cpu.cpp calls Shape."""
    batch, num_tokens, num_heads, head_dim = x.shape
    num_groups, state = B.shape[2:]
    chunk = min(chunk_size or _CHUNK, _CHUNK, max(num_tokens, 1))
    heads_in_group = num_heads // num_groups
    # Fewer heads together where threads would have nothing to do.
    threads_of_group = -(-torch.get_num_threads() // max(batch * num_groups, 1))
    block = max(1, min(_HEADS, -(-heads_in_group // threads_of_group)))
    sizes = (batch, num_tokens, num_heads, head_dim, num_groups, state, chunk, block)
    return torch.tensor(sizes)


def _layouts(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Types and strides of tensors that ``_rows`` made."""
    types = [native.TYPES[each.dtype] for each in tensors]
    strides = [stride for each in tensors for stride in each.stride()[:2]]
    return torch.tensor(types), torch.tensor(strides)


def _rows(x: Tensor, compute: torch.dtype) -> Tensor:
    """(B, S, values): a token's values side by side, in a dtype that is computed in ``compute``."""
    if wide(x.dtype) != compute:
        x = x.to(compute)
    inner = x.shape[2:]
    dense = x.numel() == 0 or (x.stride(3) == 1 and x.stride(2) == inner[1]) or inner.numel() == 1
    return x if dense else x.contiguous()


def _plain(x: Tensor | None, compute: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(compute).contiguous()


def _total(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
