"""Prune recurrent layers while they train, then make them sparse.

>>> import torch
>>> from fivefold.sparse_rnn import prune
>>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(8, 32)})
>>> pruner = prune.GradualPruner(model, prune.Cubic(density=0.1, start=0, end=100, every=10))
>>> for _ in range(101):
...     pruner.step()  # after the optimizer's
>>> prune.export(model)["rnn"]
SparseLSTM(8, 32, density=0.1001)
"""

from fivefold.sparse_rnn.prune.export import export
from fivefold.sparse_rnn.prune.patterns import Balanced, Blocks, NofM, Unstructured
from fivefold.sparse_rnn.prune.pruner import GradualPruner
from fivefold.sparse_rnn.prune.regrowth import RigL
from fivefold.sparse_rnn.prune.schedules import Cubic, Narang, OneShot

__all__ = [
    "Balanced",
    "Blocks",
    "Cubic",
    "GradualPruner",
    "Narang",
    "NofM",
    "OneShot",
    "RigL",
    "Unstructured",
    "export",
]
