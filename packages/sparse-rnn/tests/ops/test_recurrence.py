"""``recurrence`` on every backend."""

from fivefold.kernels.testing import op_tests
from fivefold.sparse_rnn.ops.recurrence import op
from fivefold.sparse_rnn.ops.recurrence.samples import SAMPLES

TestLaws = op_tests(
    SAMPLES,
    ops=(op.recurrence_forward, op.recurrence_backward),
    # How work is dealt to threads and how they meet: test_cpu.py.
    unbroken=("gang.h", "packing.h"),
)
