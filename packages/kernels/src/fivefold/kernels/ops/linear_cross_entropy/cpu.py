"""``linear_cross_entropy`` with a softmax in C++; the products are torch's."""

from functools import partial
from typing import Any

from fivefold.kernels.ops.cross_entropy import cpu as softmax
from fivefold.kernels.ops.linear_cross_entropy import chunks


def refuses(name: str, *inputs: Any) -> str | None:
    """As the softmax does."""
    tensors = inputs[0] if name == "linear_cross_entropy_scale" else inputs
    return softmax.refuses("cross_entropy_forward", tensors[0])


linear_cross_entropy_tokens = partial(chunks.tokens, softmax)
linear_cross_entropy_backward = partial(chunks.backward, softmax)
linear_cross_entropy_sum = partial(chunks.total, softmax)
linear_cross_entropy_scale = chunks.scale
