"""What Mamba-2 layers compute besides matrix products, each a folder with its kernels.

>>> from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
"""
