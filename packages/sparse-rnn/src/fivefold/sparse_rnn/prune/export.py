"""Put sparse layers in the place of pruned ones."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.layers import SparseGRU, SparseLSTM, SparseRNN
from fivefold.sparse_rnn.recurrent import SparseRecurrent

_M = TypeVar("_M", bound=nn.Module)
_NO_LAYER = "there is no torch.nn.RNN, LSTM or GRU"
_CLASSES: dict[type[nn.RNNBase], type[SparseRecurrent]] = {
    nn.LSTM: SparseLSTM,
    nn.GRU: SparseGRU,
    nn.RNN: SparseRNN,
}


def export(
    model: _M,
    *,
    max_density: float = 0.5,
    density: float | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> _M:
    """A copy of a model whose pruned recurrent layers are sparse ones.

    Cells (``torch.nn.LSTMCell`` and others) stay as they are, zeros and all.

    Args:
        model: any module; the copy has its own weights.
        max_density: layers with a larger share of nonzeros stay dense, which is faster for them.
        density: prune by magnitude to this share first; the default keeps the zeros that are there.
        masks: what is kept by the parameter's name, as ``GradualPruner.masks``, so that a kept
            weight that happens to be zero can be trained on.

    Raises:
        SparseRNNInputError: no layer became sparse.
    """
    made = copy.deepcopy(model)
    root = nn.ModuleList([made])
    # A layer that is held twice becomes one sparse layer that is held twice.
    done: dict[int, SparseRecurrent] = {}
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if id(module) not in done:
            sparse = _sparse(module, density)
            if sparse is None:
                continue
            own = name.removeprefix("0").removeprefix(".")
            _keep(sparse, f"{own}.".removeprefix("."), masks or {})
            done[id(module)] = sparse
        if done[id(module)].density <= max_density:
            parent, _, last = name.rpartition(".")
            setattr(root.get_submodule(parent), last, done[id(module)])
    if not any(isinstance(each, SparseRecurrent) for each in root.modules()):
        raise SparseRNNInputError(
            f"no layer is sparse enough, at most {max_density:.0%} nonzeros: "
            + (", ".join(f"one has {x.density:.1%}" for x in done.values()) or _NO_LAYER)
        )
    return root[0]  # type: ignore[return-value]


def _keep(layer: SparseRecurrent, prefix: str, masks: Mapping[str, Tensor]) -> None:
    """Give a layer the places of masks, where there are any for it."""
    for name in layer.recurrent_names():
        if prefix + name in masks:
            weight = layer.dense_weight(name).detach()
            layer.set_weight(name, weight, masks[prefix + name].to(weight.device))


def _sparse(module: nn.Module, density: float | None) -> SparseRecurrent | None:
    """The sparse layer for a dense one; None for any other module."""
    sparse_class = _CLASSES.get(type(module))  # type: ignore[arg-type]
    if sparse_class is None or not isinstance(module, nn.RNNBase) or module.proj_size:
        return None
    return sparse_class.from_dense(module, density)
