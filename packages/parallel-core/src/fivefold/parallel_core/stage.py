"""One pipeline stage on torch's schedules, which holds no more than its backward needs.

Korthikanti et al., arXiv 2205.05198, appendix B: once a stage's output has been sent, its data is
the next stage's input and of no use here; backward needs only its place in the graph. Without it
each microbatch in flight takes b·s·h elements less on every rank but the last.

torch keeps outputs until backward, and room for what all microbatches of a step receive for as long
as the schedule lives; here there is room from when a message is asked for until it has been used.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.utils.checkpoint import GraphExecGroup

from fivefold.parallel_core.data_parallel import collect_gradients

Around = Callable[[int, int, Sequence[Any]], AbstractContextManager[None]]
"""Stage, microbatch and what the step gave it (nothing but on the first stage) to a context."""


class _Border(torch.autograd.Function):
    """Identity; what crosses a stage's border in either direction is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # A tensor of its own and no view: no node of the graph can have saved it, and it holds
        # nothing but the storage, so that its data may be taken away.
        return x.contiguous().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def border(x: Tensor) -> Tensor:
    """``x`` as it crosses the border of a stage: contiguous, and so its gradient."""
    crossed: Tensor = _Border.apply(x)
    return crossed


def let_go(crossed: Tensor) -> None:
    """Take the data from what ``border`` gave; shape and place in the graph remain.

    The storage is freed when nobody else holds it. Autograd does where the stage's last operation
    saved its result, and so does a message until it has been sent (with gloo: waited for, which
    most of torch's schedules do at the end of a step).
    """
    crossed.data = crossed.new_empty(1).expand(crossed.shape)


class Stage(PipelineStage):
    """A stage whose messages are contiguous tensors and whose outputs go when they are sent.

    Args:
        part: the modules of the stage.
        index: of the stage.
        num_stages: in the whole pipeline.
        device: of activations.
        takes: an example of its input, without values.
        gives: an example of its output, without values.
        group: the pipeline's ranks.

    Attributes:
        around: what a microbatch's forward runs inside; None is nothing.
    """

    def __init__(
        self,
        part: nn.Module,
        index: int,
        num_stages: int,
        device: torch.device,
        *,
        takes: Tensor,
        gives: Tensor,
        group: Any,
    ):
        super().__init__(
            part, index, num_stages, device, input_args=takes, output_args=gives, group=group
        )
        self.around: Around | None = None

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls to run the modules."""
        if not self.is_first:
            args = tuple(border(x) for x in args)
        out = super().forward_maybe_with_nosync(*args, **kwargs)
        return out if self.is_last else border(out)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """What torch calls to run a microbatch forward."""
        around = (
            nullcontext()
            if self.around is None
            else self.around(self.stage_index, fwd_chunk_id, args)
        )
        with around:
            out = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        self._forget(self.args_recv_info[fwd_chunk_id])
        if self.is_last:
            # Backward starts at the loss, so the logits live on only where the loss saved them.
            self.fwd_cache[fwd_chunk_id] = ((), self.fwd_cache[fwd_chunk_id][1])
        return out

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """What torch calls to send an output; the message holds the data until it is sent."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        for out in self.fwd_cache[fwd_chunk_id][0]:
            let_go(out)
        return ops

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """What torch calls instead where the stage before is on the same rank."""
        super().set_local_fwd_input(prev_stage_outputs, mb_index)
        let_go(prev_stage_outputs)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """What torch calls to run a microbatch backward, or the inputs' part of it."""
        if not full_backward:
            self._gather_parameters()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._forget(self.grad_recv_info.get(bwd_chunk_id, ()))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """What torch calls to run the weights' part of a microbatch's backward."""
        self._gather_parameters()
        # torch does this in many pieces, each of which would recompute a whole region again.
        with GraphExecGroup():
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        collect_gradients(self.submod)

    def _gather_parameters(self) -> None:
        """Put the parameters that forward used in place where FSDP has freed them.

        A backward in two parts looks for the modules' parameters in the graph; it would not find
        the shards there and would leave them without gradients.
        """
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """What torch calls to receive an input."""
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """What torch calls to receive a gradient."""
        if self.has_backward:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self._forget(infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self._forget(infos)
        return result

    def _forget(self, infos: Iterable[Any]) -> None:
        """Hold no longer what was received; torch's lists for backward do."""
        for info in infos:
            if info.buffer is not None:
                info.like, info.buffer = info.buffer.detach().to("meta"), None

    def _make_room(self, infos: Iterable[Any]) -> None:
        for info in infos:
            like = getattr(info, "like", None)
            if info.buffer is None and like is not None:
                info.buffer = torch.empty_like(like, device=self.device)
