"""AdamW on what a rank holds, with state that any layout can load."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fivefold.parallel_core.checkpoint import TensorPart
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.parameters import Piece

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig(Config):
    """Constants of AdamW (arXiv 1711.05101); the learning rate is the schedule's.

    Attributes:
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of matrices; norms and biases (fewer than two dims) have none.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"AdamW with betas={self.betas}, eps={self.eps}, weight_decay={self.weight_decay}; "
                "betas lie in [0, 1), eps is positive, weight_decay is not negative"
            )


class MakeAdamW(Protocol):
    """Makes an optimizer that keeps its state under the names that ``torch.optim.AdamW`` has."""

    def __call__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> torch.optim.Optimizer:
        """The optimizer of these groups, which have a ``weight_decay`` each."""
        ...


TORCH_ADAMW: MakeAdamW = partial(torch.optim.AdamW, fused=True)


class ShardedAdamW:
    """AdamW on each rank's pieces.

    Args:
        pieces: what this rank holds, from the table of parameters.
        config: constants.
        make: torch's AdamW, or one that computes the same in another way.
    """

    def __init__(self, pieces: list[Piece], config: AdamWConfig, make: MakeAdamW = TORCH_ADAMW):
        # Plain local tensors: stepping on DTensors costs a dispatch for every operation.
        self._held = [(piece, piece.local) for piece in pieces if piece.local.numel()]
        matrices = [tensor for piece, tensor in self._held if decays(piece)]
        others = [tensor for piece, tensor in self._held if not decays(piece)]
        groups = [(matrices, config.weight_decay), (others, 0.0)]
        self._optimizer = make(
            [{"params": tensors, "weight_decay": w} for tensors, w in groups],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
        )
        for _, tensor in self._held:
            self._optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{name: torch.zeros_like(tensor) for name in _MOMENTS},
            }

    def step(self, learning_rate: float) -> None:
        """One update from the pieces' gradients, which are freed."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for piece, tensor in self._held:
            # Asked for anew: FSDP may have moved a parameter that it pads.
            tensor.data, tensor.grad = piece.local, piece.grad
        self._optimizer.step()
        for piece, tensor in self._held:
            tensor.grad = piece.parameter.grad = None

    def parts(self) -> dict[str, TensorPart]:
        """Both moments of every piece, as ``exp_avg.<name>`` and ``exp_avg_sq.<name>``."""
        return {
            f"{moment}.{piece.name}": part_of(piece, self._optimizer.state[tensor][moment])
            for piece, tensor in self._held
            for moment in _MOMENTS
        }

    def set_steps(self, steps: int) -> None:
        """Go on as after ``steps`` updates (for the bias correction)."""
        for _, tensor in self._held:
            self._optimizer.state[tensor]["step"].fill_(steps)


def decays(piece: Piece) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return len(piece.shape) > 1


def part_of(piece: Piece, local: Tensor) -> TensorPart:
    """The checkpoint part for a tensor that lies like ``piece.local``."""
    return TensorPart(piece.trim(local), piece.box, piece.shape)
