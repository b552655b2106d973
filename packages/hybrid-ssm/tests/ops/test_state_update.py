"""``state_update`` on every backend."""

from fivefold.hybrid_ssm.ops.state_update import op
from fivefold.hybrid_ssm.ops.state_update.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.state_update_step,))
