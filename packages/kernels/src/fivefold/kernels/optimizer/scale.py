"""What gradients are multiplied by: clipping, loss scaling and skipping, all on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.kernels.ops.adamw import gradient_norm
from fivefold.kernels.optimizer.buckets import Bucket


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor for all gradients, a tensor () or None for 1.

    Attributes:
        factor: NaN or infinite where the step is to be skipped.
        skips: whether such a factor skips the step.
    """

    factor: Tensor | None
    skips: bool

    def on(self, device: torch.device) -> Tensor | None:
        """The factor on a device."""
        return None if self.factor is None else self.factor.to(device, non_blocking=True)


def total_norm(buckets: list[Bucket], backend: str | None) -> Tensor:
    """The norm of all gradients together, on the device of the first."""
    grads = [grad for bucket in buckets for grad in bucket.grads]
    if any(hasattr(grad, "full_tensor") for grad in grads):
        norm = torch.nn.utils.get_total_norm(grads)  # over the ranks that have shards
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = [gradient_norm(each, backend) for each in by_kind.values()]
    if len(norms) == 1:
        return norms[0]
    dtype = max((norm.dtype for norm in norms), key=lambda each: each.itemsize)
    device = buckets[0].device
    together = [norm.to(device=device, dtype=dtype, non_blocking=True) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(together))


def scale_of(
    *,
    device: torch.device,
    norm: Tensor | None,
    max_norm: float | None,
    clip_factor: float | Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skip_nonfinite: bool,
) -> Scale:
    """Put together what was asked for.

    Args:
        device: where the factor is wanted.
        norm: of the gradients, without ``grad_scale``.
        max_norm: what the norm should be at most.
        clip_factor: takes the place of what ``max_norm`` asks for.
        grad_scale: what gradients were multiplied by before, as by ``torch.amp.GradScaler``.
        found_inf: not 0 where gradients are not finite, as that found.
        skip_nonfinite: whether to skip where ``norm`` or ``clip_factor`` is not finite.
    """
    factor: Tensor | None = None
    if clip_factor is not None:
        factor = _tensor(clip_factor, device)
    elif norm is not None and max_norm is not None:
        # As torch.nn.utils.clip_grad_norm_ has it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if norm is not None and skip_nonfinite:
        factor = torch.ones_like(norm) if factor is None else factor
        factor = factor.where(torch.isfinite(norm), torch.nan)
    if grad_scale is not None:
        inverse = 1 / grad_scale.to(device, non_blocking=True).squeeze()
        factor = inverse if factor is None else factor * inverse
    if found_inf is not None:
        found = found_inf.to(device, non_blocking=True).squeeze()
        factor = torch.ones_like(found) if factor is None else factor
        factor = factor.where(found == 0, torch.nan)
    return Scale(factor, skip_nonfinite or found_inf is not None)


def _tensor(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, non_blocking=True).squeeze()
    return torch.full((), value, dtype=torch.float64, device=device)
