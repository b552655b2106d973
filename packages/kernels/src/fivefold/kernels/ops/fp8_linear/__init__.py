"""A linear layer whose three matrix products run in float8, with one scale for each tensor."""

import torch
from torch import Tensor

from fivefold.kernels.ops.fp8_linear import op

__all__ = ["fp8_linear"]


def fp8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grad_dtype: torch.dtype = torch.float8_e5m2,
    power_of_2_scale: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` on operands that ``fp8_quantize`` makes: current scaling.

    Input and weight become float8_e4m3fn, the gradient of the result ``grad_dtype``, and all three
    products, of the result and of both gradients, sum in float32. That is the recipe of Nemotron-H
    (arXiv 2504.03624, section 2.3) and the default of torchao's ``Float8Linear``: on the CPU every
    bit of the result and of the gradients is what its ``emulate=True`` gives in bfloat16 and
    float32. For the gradients the float8 values are kept, one byte for each value of input and
    weight. There is no gradient of gradients.

    Args:
        input: (..., K).
        weight: (N, K), of input's dtype.
        bias: (N,), added in input's dtype after rounding.
        grad_dtype: ``torch.float8_e5m2`` or ``torch.float8_e4m3fn``.
        power_of_2_scale: round scales down to powers of two.
        backend: the default is the best there is.

    Returns:
        (..., N), of input's dtype.

    Raises:
        KernelInputError: the shapes or dtypes do not fit together.

    >>> import torch
    >>> fp8_linear(torch.tensor([[1.0, -0.3]]), torch.tensor([[0.5, 1.0]]))
    tensor([[0.2143]])
    """
    return op.apply(input, weight, bias, grad_dtype, power_of_2_scale, backend)
