"""``ssd_scan`` on every backend."""

from fivefold.hybrid_ssm.ops.ssd_scan import op
from fivefold.hybrid_ssm.ops.ssd_scan.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.ssd_scan_forward, op.ssd_scan_backward))
