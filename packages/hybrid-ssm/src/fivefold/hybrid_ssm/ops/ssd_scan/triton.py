"""``ssd_scan`` in Triton: a chunk of tokens is one tile, and its products run on tensor cores.

Forward: step sizes and decays; the states before each chunk, one program a head walking over the
chunks with the state in registers; the products of C and B of each group; the results, all chunks
at once. Backward runs the first three again, walks back with the gradients of the states, and then
takes all chunks at once: for x, for C and for B, and for the logarithms of the decays.

A decay's logarithm gets what passes from before a token to it or after it, as a sum of just that:
differences of larger sums would drown it.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

# ruff: noqa: N806 - the paper's names A, B, C and D

from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.launches import Call, Kernels, rows
from fivefold.hybrid_ssm.ops.ssd_scan.op import Arguments, Gradients, Inputs
from fivefold.hybrid_ssm.ops.ssd_scan.tiles import Tiles
from fivefold.hybrid_ssm.ops.ssd_scan.triton_backward import (
    db_kernel,
    dc_kernel,
    dcb_kernel,
    ddt_kernel,
    dstates_kernel,
    dx_kernel,
)
from fivefold.hybrid_ssm.ops.ssd_scan.triton_forward import (
    cb_kernel,
    decays_kernel,
    scan_kernel,
    states_kernel,
)
from fivefold.kernels.backends import interpreting
from fivefold.kernels.triton_parts import accumulator, float32_precision

# The values of a head are one tile.
_WIDEST_HEAD = 128


def refuses(name: str, *inputs: Any) -> str | None:
    """Heads that do not fit a tile, and float64, which tensor cores do not take."""
    x = (inputs[2:] if name == "ssd_scan_backward" else inputs)[0]
    if x.dtype == torch.float64 and not interpreting():
        return "its kernels have no float64 outside Triton's interpreter"
    if x.shape[3] > _WIDEST_HEAD:
        return f"its kernels take heads of up to {_WIDEST_HEAD} values, these have {x.shape[3]}"
    return None


def ssd_scan_forward(*inputs: *Arguments) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    given = Inputs(*inputs)
    call = _call(given, is_backward=False)
    decays = call.decays()
    states, final_state = call.states(decays, given.initial_state)
    return call.scan(decays, states, call.cb()), final_state


def ssd_scan_backward(dy: Tensor, dfinal_state: Tensor | None, *inputs: *Arguments) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    given = Inputs(*inputs)
    x, _, A, B, C, D, dt_bias, initial_state, *_ = given
    call = _call(given, is_backward=True)
    dy, decays, cb, sums = rows(dy.to(x.dtype)), call.decays(), call.cb(), call.sums()
    states, last = call.states(decays, initial_state)
    dinitial = last if initial_state is None else torch.empty_like(initial_state).contiguous()
    dstates, past = call.dstates(dy, decays, states, dinitial, dfinal_state)
    dx = call.dx(dy, decays, cb, dstates, sums)
    dcb = call.dcb(dy, decays, cb, sums)
    dC = call.dc(dy, decays, dcb, states, sums)
    dB = call.db(decays, dcb, dstates)
    ddt, dA, dbias = call.ddt(decays, sums, past)
    return (
        dx,
        ddt,
        dA.sum((0, 2)).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        x.new_empty(0) if D is None else sums[:, :, 2].sum((0, 2)).to(D.dtype),
        x.new_empty(0) if dt_bias is None else dbias.sum((0, 2)).to(dt_bias.dtype),
        x.new_empty(0) if initial_state is None else dinitial,
    )


def _call(given: Inputs, *, is_backward: bool) -> Call:
    x = rows(given.x)
    inputs = given._replace(
        x=x,
        A=given.A.contiguous(),
        B=rows(given.B.to(x.dtype)),
        C=rows(given.C.to(x.dtype)),
        D=_dense(given.D),
        dt_bias=_dense(given.dt_bias),
        documents=_dense(given.documents),
    )
    return Call(
        kernels=Kernels(
            decays=decays_kernel,
            states=states_kernel,
            cb=cb_kernel,
            scan=scan_kernel,
            dstates=dstates_kernel,
            dx=dx_kernel,
            dcb=dcb_kernel,
            dc=dc_kernel,
            db=db_kernel,
            ddt=ddt_kernel,
        ),
        compute={"COMPUTE": accumulator(x.dtype), "PRECISION": float32_precision()},
        inputs=inputs,
        tiles=Tiles.of(inputs, is_backward=is_backward),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
