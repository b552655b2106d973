"""AdamW with clipping, master weights and weight averages, each value touched once a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.adamw import adamw_step
from fivefold.kernels.optimizer import states
from fivefold.kernels.optimizer.buckets import Bucket, Settings, buckets_of, local
from fivefold.kernels.optimizer.options import check_group, check_optimizer
from fivefold.kernels.optimizer.scale import Scale, scale_of, total_norm

# What this class adds to an optimizer's attributes, for pickle and copy.
_ATTRIBUTES = ("max_norm", "skip_nonfinite", "backend", "grad_norm", "num_skipped")


class FusedAdamW(Optimizer):
    """``torch.optim.AdamW`` that clips, keeps master weights and averages in the same pass.

    Results are those of ``torch.nn.utils.clip_grad_norm_``, ``torch.optim.AdamW`` and
    ``torch.optim.swa_utils.AveragedModel`` one after the other, and gradients stay as they are.
    State dicts of ``torch.optim.AdamW`` load into it and its own into that. The host never waits
    for the device. Gradients are read once, and once more for their norm where one is needed.

    Parameters without a gradient are skipped, and so are their averages. Parameters may be on
    several devices and of several dtypes. Those that are DTensors (FSDP2, tensor parallelism) are
    updated shard by shard on each rank, and ``torch.nn.utils.get_total_norm`` reduces their norm
    over the ranks.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; a tensor of one value may be changed on its device.
        betas: of the first and second moment, from 0 and below 1.
        eps: added to the root of the second moment.
        weight_decay: shrinks parameters by ``lr * weight_decay`` of themselves in a step.
        maximize: go up the gradient.
        max_norm: gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1;
            the norm is that of all gradients of all groups.
        ema_decay: keep an exponential average of each parameter: what it keeps of itself in a step.
        swa: keep an average that weighs all steps alike. See ``averaged``.
        master_weights: keep parameters of less than 32 bits in float32 too, which is what is
            updated and then rounded. Moments are then float32; without, they have the parameter's
            dtype, as in torch.
        skip_nonfinite: where the norm (or the ``clip_factor`` of ``step``) is infinite or NaN,
            change nothing and count that in ``num_skipped``.
        backend: of the ops; the default is the best there is for each device.

    Attributes:
        grad_norm: of the gradients of the last step before clipping, a tensor (); None where it
            was not needed.
        num_skipped: steps that changed nothing, an int64 tensor () on the device; None where none
            could be. Not saved.

    Raises:
        KernelInputError: options or parameters that it does not take.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = FusedAdamW([weight], lr=0.5, weight_decay=0.0, max_norm=1.0, ema_decay=0.9)
    >>> (3 * weight).sum().backward()
    >>> optimizer.step()
    >>> weight.data, optimizer.grad_norm
    (tensor([0.5000, 0.5000]), tensor(4.2426))
    """

    # torch.amp.GradScaler then leaves unscaling and skipping to step().
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        swa: bool = False,
        master_weights: bool = False,
        skip_nonfinite: bool = False,
        backend: str | None = None,
    ):
        check_optimizer(max_norm)
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self.grad_norm: Tensor | None = None
        self.num_skipped: Tensor | None = None
        self._settings = Settings()
        self._evaluates = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "ema_decay": ema_decay,
            "swa": swa,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Raises:
            KernelInputError: options or parameters that it does not take.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except KernelInputError:
            self.param_groups.pop()
            raise

    @overload
    def step(
        self,
        closure: None = None,
        *,
        clip_factor: float | Tensor | None = None,
        average: bool = True,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        clip_factor: float | Tensor | None = None,
        average: bool = True,
    ) -> float: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        clip_factor: float | Tensor | None = None,
        average: bool = True,
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew.
            clip_factor: what gradients are multiplied by, instead of what ``max_norm`` asks for:
                for norms that only the caller knows.
            average: whether this step enters the averages.

        Returns:
            What the closure returned.

        Raises:
            KernelInputError: a sparse gradient, or a step within ``averaged``.
        """
        if self._evaluates:
            raise KernelInputError("step() within averaged() would train the averages: leave it")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = buckets_of(self.param_groups, self.state, average)
        if buckets:
            scale = self._scale(buckets, clip_factor)
            for bucket in buckets:
                self._update(bucket, scale)
        return loss

    def ema_state(self) -> list[Tensor]:
        """The average of each parameter in the order of the groups; itself where it has none yet.

        They are the optimizer's own tensors, not copies.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        return [self.state.get(param, {}).get("ema", param.detach()) for param in params]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters have the values of their averages, for evaluation.

        Their own values are kept meanwhile in a copy of all parameters and come back at the end.

        Raises:
            KernelInputError: it is already in force.
        """
        if self._evaluates:
            raise KernelInputError("averaged() is in force already")
        params = [param for group in self.param_groups for param in group["params"]]
        with torch.no_grad():
            own = [param.detach().clone() for param in params]
            _set(params, self.ema_state())
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False
            with torch.no_grad():
                _set(params, own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a ``FusedAdamW`` or a ``torch.optim.AdamW``.

        Raises:
            KernelInputError: the state is that of ``amsgrad``.
        """
        seen: list[dict[str, Any]] = []
        # The last to be called, it sees what other hooks made of the state.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: seen.append(final))
        try:
            states.check(state_dict)
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        states.restore(self.state, self.param_groups, (seen or [state_dict])[-1])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _ATTRIBUTES}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settings = Settings()
        self._evaluates = False
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _scale(self, buckets: list[Bucket], clip_factor: float | Tensor | None) -> Scale:
        inverse = getattr(self, "grad_scale", None)  # of torch.amp.GradScaler
        self.grad_norm = None
        if clip_factor is None and (self.max_norm is not None or self.skip_nonfinite):
            self.grad_norm = total_norm(buckets, self.backend)
            if inverse is not None:
                self.grad_norm = self.grad_norm / inverse.to(self.grad_norm.device)
        scale = scale_of(
            device=buckets[0].device,
            norm=self.grad_norm,
            max_norm=self.max_norm,
            clip_factor=clip_factor,
            grad_scale=inverse,
            found_inf=getattr(self, "found_inf", None),
            skip_nonfinite=self.skip_nonfinite,
        )
        if scale.skips and scale.factor is not None:
            skipped = (~torch.isfinite(scale.factor)).to(torch.int64)
            self.num_skipped = skipped + (0 if self.num_skipped is None else self.num_skipped)
        return scale

    def _update(self, bucket: Bucket, scale: Scale) -> None:
        group = bucket.group
        adamw_step(
            local(bucket.params),
            local(bucket.grads),
            local(bucket.exp_avgs),
            local(bucket.exp_avg_sqs),
            bucket.steps,
            self._settings.of(group, bucket.device),
            masters=local(bucket.masters),
            averages=local(bucket.averages),
            average_counts=bucket.average_counts,
            scale=scale.on(bucket.device),
            maximize=group["maximize"],
            swa=group["swa"],
            skip_nonfinite=scale.skips,
            backend=self.backend,
        )
        # Kernels that know addresses alone do not tell autograd of what they wrote.
        torch.autograd.graph.increment_version(local(bucket.params))


def _set(params: list[Tensor], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
