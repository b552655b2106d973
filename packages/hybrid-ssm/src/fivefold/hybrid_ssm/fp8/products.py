"""The kernels behind FP8."""

from fivefold.kernels import fp8_linear, grouped_mm
from fivefold.parallel_core.fp8.products import Products

PRODUCTS = Products(linear=fp8_linear, grouped_mm=grouped_mm)
