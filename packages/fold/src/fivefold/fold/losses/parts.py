"""What several losses need.

Legend: any leading dims, N residues, B bins.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Tensor]


def masked_mean(mask: Tensor, value: Tensor, dims: tuple[int, ...], eps: float = 1e-10) -> Tensor:
    """Mean of value over dims where mask, broadcast to it, is 1."""
    mask = mask.expand_as(value)
    return (mask * value).sum(dims) / (mask.sum(dims) + eps)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood (...) of classes target (...) under logits (..., B)."""
    log_p = torch.log_softmax(logits, -1)
    return -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of targets 0 and 1, all of one shape."""
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))


def is_resolved(batch: Batch, least: float, most: float) -> Tensor:
    """1 for structures (...) good enough to learn confidence from, in angstrom."""
    resolution = batch["resolution"]
    return ((resolution >= least) & (resolution <= most)).to(resolution.dtype)


def distances(positions: Tensor, eps: float = 1e-10) -> Tensor:
    """Distances (..., N, N) between positions (..., N, 3)."""
    apart = positions.unsqueeze(-2) - positions.unsqueeze(-3)
    return (apart.square().sum(-1) + eps).sqrt()
