"""``linear_cross_entropy`` with a softmax in Triton; the products are torch's."""

from functools import partial

from fivefold.kernels.ops.cross_entropy import triton as softmax
from fivefold.kernels.ops.linear_cross_entropy import chunks

linear_cross_entropy_tokens = partial(chunks.tokens, softmax)
linear_cross_entropy_backward = partial(chunks.backward, softmax)
linear_cross_entropy_sum = partial(chunks.total, softmax)
linear_cross_entropy_scale = chunks.scale
