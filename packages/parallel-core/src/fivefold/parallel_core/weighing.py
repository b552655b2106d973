"""How many bytes autograd keeps of a forward pass as it is, and if regions were recomputed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fivefold.parallel_core.regions import on_request


class Weighing:
    """Weighs forward passes that run while it is entered, in one pass for both numbers.

    Lighter than an ``ActivationLedger``, which says what each term is. A ledger that is entered
    outside does not see what is saved inside.

    Args:
        part: the modules that run; those recomputed on request must not be, now.

    Attributes:
        stored: bytes of the distinct storages kept, without parameters, buffers and what
            ``leave_out`` named.
        recomputed: bytes that would be left if the regions on request were recomputed: what is
            kept outside of them, and their arguments.
    """

    def __init__(self, part: nn.Module):
        self.stored = self.recomputed = 0
        self._part, self._depth = part, 0
        # Storages and not their addresses, which could be used again.
        self._excluded: dict[int, torch.UntypedStorage] = {}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._outside: dict[int, torch.UntypedStorage] = {}
        self._handles: list[RemovableHandle] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def leave_out(self, tensors: Iterable[Any]) -> None:
        """Do not weigh these tensors; anything else among them is passed over."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._excluded[storage._cdata] = storage

    def __enter__(self) -> "Weighing":
        for module in self._part.modules():
            self._handles.append(module.register_forward_pre_hook(self._exclude))
        for module in on_request(self._part):
            self._handles += [
                module.register_forward_pre_hook(self._enter_region, with_kwargs=True),
                module.register_forward_hook(self._leave_region, always_call=True),
            ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stored = sum(storage.nbytes() for storage in self._kept.values())
        self.recomputed = sum(storage.nbytes() for storage in self._outside.values())

    def let_go(self) -> None:
        """Hold no storage any longer; the numbers stay."""
        for storages in (self._excluded, self._kept, self._outside):
            storages.clear()

    def _exclude(self, module: nn.Module, _: Any) -> None:
        # Now and not before: FSDP has just put gathered parameters in place.
        self.leave_out((*module.parameters(), *module.buffers()))

    def _enter_region(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth == 0:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._keep(leaf)
        self._depth += 1

    def _leave_region(self, *_: Any) -> None:
        self._depth -= 1

    def _pack(self, tensor: Tensor) -> Tensor:
        self._keep(tensor)
        # Detached: an output that a node keeps would else keep the node alive, for ever.
        return tensor.detach()

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._excluded or isinstance(tensor, nn.Parameter):
            return
        self._kept[storage._cdata] = storage
        if self._depth == 0:
            self._outside[storage._cdata] = storage
