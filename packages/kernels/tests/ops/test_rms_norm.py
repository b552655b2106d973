"""``rms_norm`` on every backend."""

from fivefold.kernels.ops.rms_norm import op
from fivefold.kernels.ops.rms_norm.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.rms_norm_forward, op.rms_norm_backward))
