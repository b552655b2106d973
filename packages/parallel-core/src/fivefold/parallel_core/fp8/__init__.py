"""Matrix products in FP8 with per-tensor current scaling, on one rank and over ranks.

Modules become FP8 in place (``convert``), after they were split. The products themselves are given
(``products``): this package computes scales and sends float8 values, and knows no kernels.
"""
