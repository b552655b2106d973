"""How the Triton kernels of ``ssd_scan`` cut their work, so that nothing spills.

Legend: Q tokens of a chunk, H heads, P values in a head, N values of state.
"""

from dataclasses import dataclass

import torch

from fivefold.hybrid_ssm.ops.ssd_scan.op import Inputs
from fivefold.kernels.launch import TensorCores, num_sms, tensor_cores
from fivefold.kernels.sizes import next_power_of_2

# Tensor cores have products of at least so many rows.
_LEAST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Sizes of tiles and warps of programs.

    Attributes:
        chunk: Q.
        head: P up to the next power of two.
        state: values of N that are taken at once.
        walk: those that programs take which walk over the chunks with the state in registers.
        product: those of the gradients of B and C.
        warps: of most programs.
        walk_warps: of those that walk.
        db_warps: of those that make the gradient of B.
    """

    chunk: int
    head: int
    state: int
    walk: int
    product: int
    warps: int
    walk_warps: int
    db_warps: int

    @classmethod
    def of(cls, inputs: Inputs, *, is_backward: bool) -> "Tiles":
        """Those of a call.

        Args:
            inputs: of the op.
            is_backward: whether gradients are made, by smaller chunks: several tiles of pairs of
                tokens are in registers at once.
        """
        x, cores = inputs.x, tensor_cores(inputs.x)
        head, state_size = _tile(x.shape[3]), inputs.B.shape[3]
        # Sums of 128 tokens by 128 values leave no registers for operands.
        is_full = cores is TensorCores.REGISTERS and head > 64
        chunk = _chunk(x.dtype, inputs.chunk_size, 64 if is_backward or is_full else 128)
        state = min(128, _tile(state_size))
        walk = state
        if x.shape[0] * x.shape[2] * -(-state_size // state) < 2 * num_sms(x):
            walk = max(_LEAST, state // 2)
        warps = 8 if max(chunk, head) > 64 else 4
        product = min(state, 64 if head > 64 or state_size > 128 else 128)
        # Sums pass between tensor memory and the registers of a program, which are shared out
        # evenly: more warps where a state stays in them, fewer where each warp holds too few.
        in_memory = cores is TensorCores.TENSOR_MEMORY
        return cls(
            chunk=chunk,
            head=head,
            state=state,
            walk=walk,
            product=product,
            warps=warps,
            walk_warps=8 if in_memory and walk > 64 else warps,
            db_warps=4 if in_memory and product > 64 else 8,
        )


def _chunk(dtype: torch.dtype, asked: int, largest: int) -> int:
    """Q: a power of two of at least a product's rows; float32 leaves half the room."""
    largest = largest if dtype.itemsize == 2 else 64
    return max(_LEAST, min(largest, next_power_of_2(asked or largest)))


def _tile(size: int) -> int:
    return max(_LEAST, next_power_of_2(size))
