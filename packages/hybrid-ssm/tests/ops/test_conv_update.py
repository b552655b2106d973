"""``conv_update`` on every backend."""

from fivefold.hybrid_ssm.ops.conv_update import op
from fivefold.hybrid_ssm.ops.conv_update.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.conv_update_step,))
