"""``ssd_scan`` by mamba-ssm's kernels, where that is installed: a third opinion, never needed.

Its gradient runs its forward pass again. It keeps no more than our own kernels do.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.op import Arguments, Gradients, Inputs

_CHUNK = 256


def refuses(name: str, *inputs: Any) -> str | None:
    """Tensors that are not on a CUDA device, float64, and machines without mamba-ssm."""
    x = (inputs[2:] if name == "ssd_scan_backward" else inputs)[0]
    if find_spec("mamba_ssm") is None:
        return 'mamba_ssm is not installed: pip install "fivefold-hybrid-ssm[mamba]"'
    if not x.is_cuda:
        return f"it runs tensors of a CUDA device, these are on {x.device}"
    if x.dtype == torch.float64:
        return "its kernels have no float64"
    return None


def ssd_scan_forward(*inputs: *Arguments) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    given = Inputs(*inputs)
    y, final_state = mamba_chunk_scan_combined(
        *given[:5],
        given.chunk_size or _CHUNK,
        D=given.D,
        dt_bias=given.dt_bias,
        initial_states=given.initial_state,
        seq_idx=given.documents,
        dt_softplus=given.dt_softplus,
        dt_limit=given.limits[1:],
        return_final_states=True,
    )
    return y, final_state


def ssd_scan_backward(dy: Tensor, dfinal_state: Tensor | None, *inputs: *Arguments) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    given = Inputs(*inputs)
    leaves = [None if each is None else each.detach().requires_grad_() for each in inputs[:8]]
    with torch.enable_grad():
        # A tuple's fields are as optional as those of the inputs that the leaves are copies of.
        outputs = ssd_scan_forward(*leaves, *inputs[8:])  # type: ignore[call-arg, arg-type]
    weights = [dy, torch.zeros_like(outputs[1]) if dfinal_state is None else dfinal_state]
    wanted = [each for each in leaves if each is not None]
    found = iter(torch.autograd.grad(outputs, wanted, weights))
    gradients = [given.x.new_empty(0) if each is None else next(found) for each in leaves]
    return tuple(gradients)  # type: ignore[return-value]
