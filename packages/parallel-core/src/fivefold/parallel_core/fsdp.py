"""FSDP2 as this package uses it: sums and no means, and messages booked on their axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fivefold.parallel_core._compat import all_gather_single, reduce_scatter_single
from fivefold.parallel_core.chunks import dim_to_cut
from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.replicas import sum_copies
from fivefold.parallel_core.topology import Axis, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """How the parameters of a module lie over the data axes.

    Attributes:
        shard: ranks that share one copy.
        replicate: ranks that hold the same shard; gradients are summed over them too.
        reshard_after_forward: free gathered parameters after forward (ZeRO-3).
        compute: dtype of the gathered parameters; None is their own.
        reduce: dtype in which gradients are summed; None is their own.
        ignored: parameters that stay as they are.
    """

    shard: Axis
    replicate: Axis
    reshard_after_forward: bool
    compute: torch.dtype | None
    reduce: torch.dtype | None
    ignored: set[nn.Parameter]


def shard_module(module: nn.Module, topology: Topology, options: ShardOptions) -> None:
    """Shard the parameters of ``module`` that no module inside has sharded, in place."""
    size = options.shard.size
    sharded = fully_shard(
        module,
        mesh=topology.mesh(options.shard.name),
        shard_placement_fn=lambda parameter: Shard(dim_to_cut(parameter.shape, size)),
        mp_policy=MixedPrecisionPolicy(param_dtype=options.compute, reduce_dtype=options.reduce),
        reshard_after_forward=options.reshard_after_forward,
        ignored_params=options.ignored,
    )
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    gather: Any = _Gather(options.shard.name)
    reduce_scatter: Any = _ReduceScatter(options.shard.name)
    sharded.set_custom_all_gather(gather)
    sharded.set_custom_reduce_scatter(reduce_scatter)
    if options.replicate.size > 1:
        sharded.set_all_reduce_hook(partial(sum_copies, axis=options.replicate))


class _Booked:
    """Room for messages, as torch makes it, and the axis that they are booked on."""

    def __init__(self, axis: str):
        self._axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Booked):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        with labelled(self._axis):
            return all_gather_single(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(_Booked):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(f"FSDP was told to sum gradients, and asks for {op}")
        with labelled(self._axis):
            return reduce_scatter_single(output_tensor, input_tensor, group, async_op)
