"""The specification of ``linear_cross_entropy``: the plain softmax, some tokens at a time."""

from functools import partial

from fivefold.kernels.ops.cross_entropy import reference as softmax
from fivefold.kernels.ops.linear_cross_entropy import chunks

linear_cross_entropy_tokens = partial(chunks.tokens, softmax)
linear_cross_entropy_backward = partial(chunks.backward, softmax)
linear_cross_entropy_sum = partial(chunks.total, softmax)
linear_cross_entropy_scale = chunks.scale
