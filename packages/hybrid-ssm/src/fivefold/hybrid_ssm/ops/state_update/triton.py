"""``state_update`` in Triton: some rows of a head's state in each program.

Legend: B batch, H heads, P values in a head, G groups, N values of state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.triton_parts import clamped, softened
from fivefold.hybrid_ssm.ops.state_update.op import Arguments, Inputs, wide
from fivefold.kernels.launch import launch
from fivefold.kernels.sizes import next_power_of_2
from fivefold.kernels.triton_parts import accumulator, sigmoid

# Values of state in a program.
_TILE = 4096


def state_update_step(*inputs: *Arguments) -> Tensor:
    """``state`` to the next one, in place; returns the result (B, H, P)."""
    given = Inputs(*inputs)
    state, x = given.state, given.x
    batch, num_heads, head_dim = x.shape
    num_groups, width = given.B.shape[1:]
    dense = state.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = next_power_of_2(width)
    rows = max(1, min(next_power_of_2(head_dim), _TILE // columns))
    vectors = (None if each is None else each.contiguous() for each in given.tensors[1:])
    launch(
        _step_kernel,
        (batch * num_heads, triton.cdiv(head_dim, rows)),
        dense,
        *vectors,
        y,
        num_heads,
        num_heads // num_groups,
        head_dim,
        width,
        *given.limits[1:],
        HAS_D=given.D is not None,
        HAS_Z=given.z is not None,
        HAS_BIAS=given.dt_bias is not None,
        SOFTPLUS=given.dt_softplus,
        COMPUTE=accumulator(wide(state.dtype, x.dtype)),
        ROWS=rows,
        COLS=columns,
    )
    if dense is not state:
        state.copy_(dense)
    return y


@triton.jit
def _step_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    num_heads,
    heads_in_group,
    head_dim,
    width,
    dt_min,
    dt_max,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = index % num_heads
    # Heads in a group divide the heads of a sequence.
    group = index // heads_in_group
    rows, cols = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    row_in, col_in = rows < head_dim, cols < width
    inside = row_in[:, None] & col_in[None, :]
    dt = tl.load(dt_ptr + index).to(COMPUTE)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + head).to(COMPUTE)
    dt = clamped(softened(dt, SOFTPLUS), dt_min, dt_max)
    decay = tl.exp(dt * tl.load(a_ptr + head).to(COMPUTE))
    x = tl.load(x_ptr + index * head_dim + rows, mask=row_in, other=0).to(COMPUTE)
    b = tl.load(b_ptr + group * width + cols, mask=col_in, other=0).to(COMPUTE)
    c = tl.load(c_ptr + group * width + cols, mask=col_in, other=0).to(COMPUTE)
    at = state_ptr + (index * head_dim + rows)[:, None] * width + cols[None, :]
    state = tl.load(at, mask=inside, other=0).to(COMPUTE)
    state = state * decay + (dt * x)[:, None] * b[None, :]
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=inside)
    y = tl.sum(state * c[None, :], axis=1)
    if HAS_D:
        y += x * tl.load(d_ptr + head).to(COMPUTE)
    if HAS_Z:
        z = tl.load(z_ptr + index * head_dim + rows, mask=row_in, other=0).to(COMPUTE)
        y *= z * sigmoid(z)
    tl.store(y_ptr + index * head_dim + rows, y.to(y_ptr.dtype.element_ty), mask=row_in)
