"""Which parameters one call of the op updates: those alike in group, device and dtypes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.adamw import adamw_settings
from fivefold.kernels.optimizer import states

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Parameters with what belongs to them, place by place; empty lists are not wanted.

    Attributes:
        group: whose options they have.
        device: where all are.
    """

    group: Group
    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    average_counts: list[Tensor] = field(default_factory=list)

    def add(self, param: Tensor, grad: Tensor, state: states.State) -> None:
        """Add a parameter with a complete state."""
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.steps.append(state["step"])
        if self.group["master_weights"] and "master" in state:
            self.masters.append(state["master"])


def buckets_of(
    groups: list[Group], all_states: dict[Tensor, states.State], average: bool
) -> list[Bucket]:
    """All parameters that have a gradient; begins the states of those that are new.

    Args:
        groups: of the optimizer.
        all_states: of its parameters.
        average: whether this step enters the averages.

    Raises:
        KernelInputError: a sparse gradient.
    """
    found: dict[tuple[Any, ...], Bucket] = {}
    for index, group in enumerate(groups):
        averages = average and states.averages(group)
        for param, grad in _with_gradient(group):
            state = all_states[param]
            states.complete(state, param, group, averages)
            kind = (index, param.device, param.dtype, grad.dtype, state["exp_avg"].dtype)
            if kind not in found:
                found[kind] = Bucket(group=group, device=param.device)
            bucket = found[kind]
            bucket.add(param, grad, state)
            if averages:
                bucket.averages.append(state["ema"])
                bucket.average_counts.append(state["ema_step"])
    return list(found.values())


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The shards of DTensors that this rank has; other tensors as they are."""
    return [each.to_local() if hasattr(each, "to_local") else each for each in tensors]


class Settings:
    """The numbers that each group's update takes, on each device, written where they changed."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device], tuple[list[Any], Tensor]] = {}

    def of(self, group: Group, device: torch.device) -> Tensor:
        """As ``adamw_settings`` has them."""
        decay = 0.0 if group["ema_decay"] is None else group["ema_decay"]
        wanted = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], decay]
        key = (id(group), device)
        if key not in self._kept:
            self._kept[key] = ([None] * len(wanted), adamw_settings(device=device))
        written, tensor = self._kept[key]
        for place, value in enumerate(wanted):
            if isinstance(value, Tensor):  # may have changed where the host does not look
                tensor[place].copy_(value.squeeze(), non_blocking=True)
            elif value != written[place]:
                tensor[place].fill_(value)
            written[place] = value
        return tensor


def _with_gradient(group: Group) -> Iterator[tuple[Tensor, Tensor]]:
    for param in group["params"]:
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            raise KernelInputError(
                f"FusedAdamW takes dense gradients, found one of {param.grad.layout} for a "
                f"parameter of shape {tuple(param.shape)}: use torch.optim.SparseAdam, or sparse="
                "False in the embedding"
            )
        yield param, param.grad
