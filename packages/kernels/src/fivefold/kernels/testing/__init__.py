"""A kit that tests ops: any package uses it on its own. Needs ``fivefold-kernels[testing]``.

>>> from fivefold.kernels.testing import TOLERANCES
>>> max(TOLERANCES.values())
0.02
"""

from fivefold.kernels.testing.machine_code import machine_code_tests
from fivefold.kernels.testing.suite import op_tests
from fivefold.kernels.testing.tolerances import TOLERANCES, assert_close

__all__ = ["TOLERANCES", "assert_close", "machine_code_tests", "op_tests"]
