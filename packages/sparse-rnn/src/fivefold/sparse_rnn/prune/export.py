"""Put sparse layers in the place of pruned ones."""

import copy
from typing import TypeVar

from torch import nn

from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.layers import SparseGRU, SparseLSTM, SparseRNN
from fivefold.sparse_rnn.recurrent import SparseRecurrent

_M = TypeVar("_M", bound=nn.Module)
_CLASSES: dict[type[nn.RNNBase], type[SparseRecurrent]] = {
    nn.LSTM: SparseLSTM,
    nn.GRU: SparseGRU,
    nn.RNN: SparseRNN,
}


def export(model: _M, *, max_density: float = 0.5, density: float | None = None) -> _M:
    """A copy of a model whose pruned recurrent layers are sparse ones.

    Args:
        model: any module; the copy has its own weights.
        max_density: layers with a larger share of nonzeros stay dense, which is faster for them.
        density: prune by magnitude to this share first; the default keeps the zeros that are there.

    Raises:
        SparseRNNInputError: no layer became sparse.
    """
    made = copy.deepcopy(model)
    found: list[str] = []
    if isinstance(made, nn.RNNBase):
        made = nn.ModuleList([made])  # type: ignore[assignment]
    for name, module in list(made.named_modules()):
        sparse = _sparse(module, density)
        if sparse is None:
            continue
        found.append(f"{name} has {sparse.density:.1%}")
        if sparse.density <= max_density:
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, sparse)
    if not any(isinstance(each, SparseRecurrent) for each in made.modules()):
        seen = "; ".join(found) or "there is no torch.nn.RNN, LSTM or GRU"
        raise SparseRNNInputError(
            f"no layer is sparse enough, at most {max_density:.0%} nonzeros: {seen}"
        )
    return made[0] if isinstance(model, nn.RNNBase) else made  # type: ignore[index]


def _sparse(module: nn.Module, density: float | None) -> SparseRecurrent | None:
    """The sparse layer for a dense one; None for any other module."""
    sparse_class = _CLASSES.get(type(module))  # type: ignore[arg-type]
    if sparse_class is None or not isinstance(module, nn.RNNBase) or module.proj_size:
        return None
    return sparse_class.from_dense(module, density)
