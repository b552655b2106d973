"""Counting what autograd keeps for backward, storage by storage, under names.

Korthikanti et al., arXiv 2205.05198, section 4, counts activations by such terms: the input of the
norm, queries and keys, the softmax's output, a dropout's mask, ...
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


class _Kept:
    """What stands in the graph for a saved tensor; it dies when autograd lets go of it."""

    def __init__(self, ledger: "ActivationLedger", tensor: Tensor, key: int | None):
        # Detached: an output that a node keeps would else keep the node alive, for ever.
        self.ledger, self.tensor, self.key = ledger, tensor.detach(), key

    def __del__(self) -> None:
        if self.key is not None:
            self.ledger._release(self.key)


class _Storage:
    """A storage that autograd keeps: how often, how large, and what it holds."""

    __slots__ = ("count", "nbytes", "term")

    def __init__(self, nbytes: int, term: str):
        self.count, self.nbytes, self.term = 0, nbytes, term


class _Scope:
    """A module that is running: its name, and what its arguments are called."""

    def __init__(self, name: str, arguments: dict[int, str]):
        self.name, self.arguments = name, arguments


class ActivationLedger:
    """Names and counts the activations that autograd keeps, while it is entered.

    Each storage counts once, with all its bytes, however many tensors of the graph look at it;
    parameters and buffers of the model do not count. A term is named after the module that first
    kept the storage and what it is there:

    - ``layers.0.mlp.down.input``: an argument of the module; ``input`` where it has one tensor,
      else the argument's name without its shape letters, as ``layers.0.attention.core.q``;
    - ``layers.0.attention.core.softmax``: made in the module by this operator; a second or third
      result has its number behind it, as a dropout's mask has in ``native_dropout.1``.

    Bytes go when backward frees them, so ``live`` and ``peak`` follow a pipeline schedule. What a
    recomputed region makes again in backward is not seen: it lives only while the region's backward
    runs.

    Args:
        model: whose modules give the names.

    Attributes:
        live: bytes kept now.
        peak: the most bytes kept at once.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> with ActivationLedger(model) as ledger:
        ...     y = model(torch.ones(2, 3))
        >>> ledger.terms()
        {'0.input': 24, '1.relu': 40}
    """

    def __init__(self, model: nn.Module):
        self.live = 0
        self.peak = 0
        self._model = model
        self._storages: dict[int, _Storage] = {}
        self._makers: dict[int, tuple[str, int]] = {}
        self._excluded: set[int] = set()
        self._scopes: list[_Scope] = []
        self._handles: list[RemovableHandle] = []
        self._operators = _Operators(self)
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "ActivationLedger":
        for name, module in self._model.named_modules():
            self._watch(name, module)
        self._operators.__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._operators.__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._makers.clear()

    def terms(self) -> dict[str, int]:
        """Bytes that are kept now, by term, in the order in which they were kept."""
        terms: dict[str, int] = defaultdict(int)
        for storage in self._storages.values():
            terms[storage.term] += storage.nbytes
        return dict(terms)

    def report(self) -> str:
        """A table: term and bytes, and their sum."""
        terms = self.terms()
        width = max(map(len, [*terms, "total"]))
        lines = [f"{term:<{width}}{nbytes:>16,}" for term, nbytes in terms.items()]
        return "\n".join([*lines, f"{'total':<{width}}{self.live:>16,}"])

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._exclude(module)
            self._scopes.append(_Scope(name, _named_storages(module, args, kwargs)))

        def leave(*_: Any) -> None:
            self._scopes.pop()

        self._handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _exclude(self, module: nn.Module) -> None:
        # Now and not at the start: FSDP puts gathered parameters in place just before.
        self._excluded.update(map(_key, (*module.parameters(), *module.buffers())))

    def _made(self, operator: str, inputs: Any, results: Any) -> None:
        """Remember who made the storages of an operator's results; views keep their maker."""
        old = {_key(tensor) for tensor in _tensors(inputs)}
        for number, tensor in enumerate(_tensors(results)):
            key = _key(tensor)
            if key not in old:
                self._makers[key] = (operator, number)
                # An address that was a parameter's, which is gone.
                self._excluded.discard(key)

    def _pack(self, tensor: Tensor) -> _Kept:
        key = _key(tensor)
        if key in self._excluded or isinstance(tensor, nn.Parameter):
            return _Kept(self, tensor, None)
        storage = self._storages.get(key)
        if storage is None:
            storage = _Storage(tensor.untyped_storage().nbytes(), self._term(key))
            self._storages[key] = storage
            self.live += storage.nbytes
            self.peak = max(self.peak, self.live)
        storage.count += 1
        return _Kept(self, tensor, key)

    def _release(self, key: int) -> None:
        storage = self._storages[key]
        storage.count -= 1
        if storage.count == 0:
            self.live -= storage.nbytes
            del self._storages[key]

    def _term(self, key: int) -> str:
        scope = self._scopes[-1] if self._scopes else _Scope("", {})
        what = scope.arguments.get(key)
        if what is None:
            operator, number = self._makers.get(key, ("outside", 0))
            what = f"{operator}.{number}" if number else operator
        return f"{scope.name}.{what}" if scope.name else what


class _Operators(TorchDispatchMode):
    """Tells the ledger which operator made which storage."""

    def __init__(self, ledger: ActivationLedger):
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        self._ledger._made(func._opname.strip("_"), (args, kwargs), results)
        return results


def _unpack(kept: _Kept) -> Tensor:
    return kept.tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _named_storages(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, str]:
    """Storage of each tensor among a call's arguments to the argument's name."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    tensors = [(name, tensor) for name, value in bound.items() for tensor in _tensors(value)]
    if len(tensors) == 1:
        return {_key(tensors[0][1]): "input"}
    return {_key(tensor): name.rpartition("_")[0] or name for name, tensor in tensors}
