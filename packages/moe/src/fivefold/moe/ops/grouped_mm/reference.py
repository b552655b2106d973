"""The specification of ``grouped_mm`` and of its weight gradient: one matmul per group.

Legend: T rows, E groups, K input width, N output width.
"""

import torch
from torch import Tensor


def grouped_mm(x_tk: Tensor, weight_enk: Tensor, counts_e: Tensor) -> Tensor:
    """``(T, N)``: group ``e`` of the rows times ``weight[e]`` transposed."""
    out_tn = x_tk.new_empty(x_tk.shape[0], weight_enk.shape[1])
    for expert, (start, stop) in enumerate(_spans(counts_e)):
        torch.mm(x_tk[start:stop], weight_enk[expert].mT, out=out_tn[start:stop])
    return out_tn


def grouped_outer(y_tn: Tensor, x_tk: Tensor, counts_e: Tensor) -> Tensor:
    """``(E, N, K)``: for each group the sum over its rows of ``y_t`` outer ``x_t``."""
    out_enk = x_tk.new_empty(counts_e.shape[0], y_tn.shape[1], x_tk.shape[1])
    for expert, (start, stop) in enumerate(_spans(counts_e)):
        torch.mm(y_tn[start:stop].mT, x_tk[start:stop], out=out_enk[expert])
    return out_enk


def _spans(counts_e: Tensor) -> list[tuple[int, int]]:
    stops = counts_e.cumsum(0).tolist()
    return list(zip([0, *stops], stops, strict=False))
