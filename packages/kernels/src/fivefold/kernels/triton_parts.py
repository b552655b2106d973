"""Parts that Triton kernels share. Import it only from files that need Triton.

Under ``TRITON_INTERPRET=1`` the same functions run on the CPU.
"""

import torch
import triton
import triton.language as tl

from fivefold.kernels.backends import interpreting

# The interpreter's product of bfloat16 and float8 operands is wrong: it multiplies their bits.
_UPCAST = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = "ieee"):
    """``acc + a @ b`` on tensor cores, accumulated in acc's dtype.

    ``PRECISION`` is for float32 operands: "ieee" is exact, "tf32" fast.
    """
    if _UPCAST:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def sigmoid(x):
    """The logistic function in x's own dtype; ``tl.sigmoid`` takes float32 alone."""
    return 1 / (1 + tl.exp(-x))


def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """In what a kernel computes: float64 if an operand is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def float32_precision() -> str:
    """PRECISION of ``dot`` that the user allows: ``torch.set_float32_matmul_precision``."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
