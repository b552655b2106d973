"""Data parallelism with whole parameters on every rank: replication and ZeRO-1.

Forward and backward work with the module's own parameters and leave whole gradients. These are
reduce-scattered over the ranks that share one copy of the optimizer's state and all-reduced over
the copies; each rank updates its shard, its *main* parameter, and the shards are gathered before
the next forward (ZeRO stage 1, arXiv 1910.02054). Replication is the case of shards of one rank.

Of P elements on d ranks that share a copy, a rank keeps P of the compute dtype, P of the storage
dtype between backward and the reduction, and P/d of the storage dtype as main parameters and for
each of the optimizer's moments; where d is 1 and the dtypes are one, the main parameters are the
module's. A step sends (d-1)/d·P each way and 2(r-1)/r·P/d to the r copies, P with padding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fivefold.parallel_core._compat import reduce_scatter_single
from fivefold.parallel_core.box import Box
from fivefold.parallel_core.chunks import Chunks
from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.ledger import labelled
from fivefold.parallel_core.overlap import Overlap
from fivefold.parallel_core.topology import Axis

Begun = tuple[list[tuple[str, int]], Callable[[], Tensor]]
"""Where the gradients of a message lie in what the function waits for and gives."""


def start_sum(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begin to all-reduce ``x`` in place; what is returned waits, and gives ``x``."""
    if axis.group is None:
        return lambda: x
    with labelled(axis.name):
        work = dist.all_reduce(x, group=axis.group, async_op=True)
    return partial(_wait, work, x, x)


def start_scatter_sum(rows: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Begin to reduce-scatter ``rows`` (ranks, n); what is returned waits, and gives (n,)."""
    if axis.group is None:
        return lambda: rows[0]
    mine = torch.empty_like(rows[0])
    with labelled(axis.name):
        work = reduce_scatter_single(mine, rows.flatten(), axis.group, async_op=True)
    return partial(_wait, work, rows, mine)


def _wait(work: dist.Work | None, sent: Tensor, received: Tensor) -> Tensor:
    """``received``, when it is there; ``sent`` must live until then."""
    if work is not None:
        work.wait()
    return received


def sum_copies(x: Tensor, axis: Axis) -> None:
    """All-reduce ``x`` over ``axis``, in place."""
    start_sum(x, axis)()


class Replicas:
    """Main parameters and reductions of some of a model's parameters.

    Args:
        model: on meta or with values; its parameters here become those of ``compute`` dtype.
        buckets: names of the parameters that go in one message each.
        shard: ranks that share one copy of the optimizer's state.
        replicate: ranks that hold the same shard.
        storage: dtype of main parameters and of reduced gradients.
        compute: dtype of forward and backward.
        overlap: begin reductions within a backward that ``expect_last`` announced; the axes then
            need groups of their own.

    Raises:
        ConfigError: a parameter without dims, which cannot be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: Sequence[Sequence[str]],
        shard: Axis,
        replicate: Axis,
        *,
        storage: torch.dtype,
        compute: torch.dtype,
        overlap: bool = False,
    ):
        self.shard, self.replicate = shard, replicate
        self._model, self._buckets = model, buckets
        self._storage, self._compute = storage, compute
        self._mains: dict[str, nn.Parameter] = {}
        self._watched: dict[str, nn.Parameter] = {}
        self._sums: dict[str, Tensor] = {}
        # Backward comes to the last layers first.
        self._reductions = Overlap(buckets[::-1], self._begin)
        self._overlap = overlap
        self._fresh = False
        for name in (name for bucket in buckets for name in bucket):
            self._adopt(name)
        model.register_forward_pre_hook(lambda *_: None if self._fresh else self.gather())

    @property
    def _alike(self) -> bool:
        """Whether main parameters are the module's own."""
        return self.shard.size == 1 and not self.mixed

    @property
    def mixed(self) -> bool:
        """Whether forward and backward compute in another dtype than is stored."""
        return self._storage != self._compute

    def _adopt(self, name: str) -> None:
        parameter = self._model.get_parameter(name)
        if parameter.dim() == 0:
            raise ConfigError(
                f"{name} has no dims and cannot be cut over ranks; give it the shape (1,)"
            )
        if not parameter.is_meta:
            self.main(name)  # before the values are rounded
        parameter.data = parameter.data.to(self._compute)

    @property
    def names(self) -> list[str]:
        """Of all parameters here."""
        return [name for bucket in self._buckets for name in bucket]

    def __contains__(self, name: str) -> bool:
        return any(name in bucket for bucket in self._buckets)

    def box(self, name: str) -> Box:
        """What this rank's main parameter is of the module's."""
        return self._chunks(name).box(self.shard.rank)

    def _chunks(self, name: str) -> Chunks:
        return Chunks(tuple(self._model.get_parameter(name).shape), self.shard.size)

    def main(self, name: str) -> nn.Parameter:
        """This rank's shard of a parameter, which the optimizer steps on; its gradient is the sum.

        Whoever asks may change it: the next forward gathers again.
        """
        parameter = self._model.get_parameter(name)
        self._fresh = False
        if self._alike:
            return parameter
        main = self._mains.get(name)
        # Made anew when the model has come from meta.
        if main is None or main.device != parameter.device:
            values = parameter.detach()[self.box(name).slices].to(self._storage, copy=True)
            main = nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad)
            self._mains[name] = main
        return main

    @torch.no_grad()
    def gather(self) -> None:
        """Give the module's parameters the values of all ranks' main parameters."""
        for bucket in self._buckets:
            for name in bucket:
                self._watch(name, self._model.get_parameter(name))
            if not self._alike:
                self._gather_bucket(bucket)
        self._fresh = True

    def _gather_bucket(self, bucket: Sequence[str]) -> None:
        spans, total = self._spans(bucket)
        mains = {name: self.main(name) for name in bucket}
        device = next(iter(mains.values())).device
        mine = torch.zeros(total, dtype=self._compute, device=device)
        for name, start in spans:
            main = mains[name]
            mine[start : start + main.numel()].copy_(main.reshape(-1))
        rows = gather_along(mine, self.shard, 0).view(self.shard.size, total)
        for name, start in spans:
            parameter = self._model.get_parameter(name)
            for row, box in self._rows(name):
                part = rows[row, start : start + box.numel].view(box.size)
                parameter.detach()[box.slices].copy_(part)

    def _spans(self, names: Sequence[str]) -> tuple[list[tuple[str, int]], int]:
        """Where each parameter's chunk starts in a rank's part of a message, and its length."""
        spans, start = [], 0
        for name in names:
            spans.append((name, start))
            start += self._chunks(name).padded
        return spans, start

    def _rows(self, name: str) -> Iterator[tuple[int, Box]]:
        """Each rank's box of a parameter."""
        chunks = self._chunks(name)
        return ((row, chunks.box(row)) for row in range(self.shard.size))

    # ---- gradients -------------------------------------------------------------------------

    def _watch(self, name: str, parameter: nn.Parameter) -> None:
        """See gradients as they come, where something is to be done with them then."""
        wanted = (self.mixed or self._overlap) and parameter.requires_grad
        if wanted and self._watched.get(name) is not parameter:
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
            self._watched[name] = parameter

    @torch.no_grad()
    def _arrived(self, name: str, parameter: Tensor) -> None:
        if self.mixed:
            self._collect(name, parameter)
        self._reductions.arrived(name)

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Sum a gradient in the storage dtype."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            self._sums[name] = grad.to(self._storage)

    def add(self, name: str, gradient: Tensor, scale: float) -> None:
        """Sum a gradient times ``scale`` in the storage dtype; where dtypes are mixed."""
        if name in self._sums:
            self._sums[name].add_(gradient, alpha=scale)
        else:
            self._sums[name] = gradient.to(self._storage, copy=True).mul_(scale)

    def collect(self) -> None:
        """Sum what backward left; for schedules that set gradients without autograd's hooks."""
        if self.mixed:
            for name in (name for bucket in self._buckets for name in bucket):
                self._collect(name, self._model.get_parameter(name))

    def expect_last(self) -> None:
        """Gradients that come from now on are a step's last, and may be reduced as they come."""
        if self._overlap:
            self._reductions.arm()

    @torch.no_grad()
    def reduce(self) -> None:
        """Give every main parameter its gradient, summed over the ranks; the whole ones go.

        A parameter without gradient counts as zero, since other ranks may have one.
        """
        self.collect()
        for begun in self._reductions.finish():
            if begun is not None:
                self._hand_out(*begun)
        self._fresh = False

    @torch.no_grad()
    def _begin(self, bucket: Sequence[str]) -> Begun | None:
        """Start to reduce a bucket; None where it has nothing to train."""
        names = [name for name in bucket if self._model.get_parameter(name).requires_grad]
        if not names:
            return None
        spans, total = self._spans(names)
        rows = self._pack(spans, total)
        if self.shard.size == 1:
            return spans, start_sum(rows[0], self.replicate)
        scattered = start_scatter_sum(rows, self.shard)
        return spans, lambda: start_sum(scattered(), self.replicate)()

    def _hand_out(self, spans: list[tuple[str, int]], wait: Callable[[], Tensor]) -> None:
        mine = wait()
        for name, start in spans:
            box = self.box(name)
            self.main(name).grad = mine[start : start + box.numel].view(box.size)

    def _pack(self, spans: list[tuple[str, int]], total: int) -> Tensor:
        """The gradients, each rank's part in a row; they are nowhere else afterwards."""
        device = self._model.get_parameter(spans[0][0]).device
        rows = torch.zeros((self.shard.size, total), dtype=self._storage, device=device)
        for name, start in spans:
            grad = self._take(name)
            if grad is None:
                continue
            for row, box in self._rows(name):
                rows[row, start : start + box.numel].copy_(grad[box.slices].reshape(-1))
        return rows

    def _take(self, name: str) -> Tensor | None:
        """The whole gradient, which nobody holds any longer."""
        if self.mixed:
            return self._sums.pop(name, None)
        parameter = self._model.get_parameter(name)
        grad, parameter.grad = parameter.grad, None
        return grad
