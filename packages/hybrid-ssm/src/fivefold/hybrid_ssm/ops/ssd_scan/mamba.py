"""``ssd_scan`` by mamba-ssm's kernels, where that is installed: a third opinion, never needed.

Its gradient runs its forward pass again. It keeps no more than our own kernels do.
"""

# ruff: noqa: N803 - the paper's names A, B, C and D

from importlib.util import find_spec

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.reference import Gradients

_CHUNK = 256


def refuses(name: str, *inputs: object) -> str | None:
    """Tensors that are not on a CUDA device, float64, and machines without mamba-ssm."""
    x = inputs[2] if name == "ssd_scan_backward" else inputs[0]
    assert isinstance(x, Tensor)
    if find_spec("mamba_ssm") is None:
        return 'mamba_ssm is not installed: pip install "fivefold-hybrid-ssm[mamba]"'
    if not x.is_cuda:
        return f"it runs tensors of a CUDA device, these are on {x.device}"
    if x.dtype == torch.float64:
        return "its kernels have no float64"
    return None


def ssd_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The result (B, S, H, P) and the final state (B, H, P, N)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, final_state = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size or _CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        seq_idx=documents,
        dt_softplus=dt_softplus,
        dt_limit=(dt_min, dt_max),
        return_final_states=True,
    )
    return y, final_state


def ssd_scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> Gradients:
    """Gradients of ``x`` to ``initial_state``; empty (0,) where absent."""
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    leaves = [None if each is None else each.detach().requires_grad_() for each in given]
    with torch.enable_grad():
        options = (documents, dt_softplus, dt_min, dt_max, chunk_size)
        outputs = ssd_scan_forward(*leaves, *options)  # type: ignore[arg-type, call-arg]
    weights = [dy, torch.zeros_like(outputs[1]) if dfinal_state is None else dfinal_state]
    wanted = [each for each in leaves if each is not None]
    found = iter(torch.autograd.grad(outputs, wanted, weights))
    gradients = [x.new_empty(0) if each is None else next(found) for each in leaves]
    return tuple(gradients)  # type: ignore[return-value]
