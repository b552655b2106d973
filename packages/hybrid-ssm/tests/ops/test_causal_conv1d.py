"""``causal_conv1d`` on every backend."""

from fivefold.hybrid_ssm.ops.causal_conv1d import op
from fivefold.hybrid_ssm.ops.causal_conv1d.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.causal_conv1d_forward, op.causal_conv1d_backward))
