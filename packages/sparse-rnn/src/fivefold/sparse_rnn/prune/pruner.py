"""Prune the recurrent layers of any model in place, step by step, as it trains."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fivefold.sparse_rnn.errors import SparseRNNInputError
from fivefold.sparse_rnn.prune.patterns import Pattern, Unstructured
from fivefold.sparse_rnn.prune.regrowth import RigL, regrow
from fivefold.sparse_rnn.prune.schedules import Schedule

Scope = Literal["global", "matrix", "gate"]
SCOPES: tuple[Scope, ...] = ("global", "matrix", "gate")


class GradualPruner:
    """Keeps the weights of torch's recurrent layers under masks that a schedule makes sparser.

    Call ``step`` after each step of the optimizer. Pruned weights are zero and get no gradient;
    momentum that an optimizer has gathered does not move them either.

    Args:
        model: any module that holds ``torch.nn.RNN``, ``LSTM``, ``GRU``, or cells of them; on the
            device where it is trained.
        schedule: when and how much, see ``fivefold.sparse_rnn.prune.schedules``.
        pattern: which values may be kept together.
        scope: what shares a budget: "global" all matrices, "matrix" each one, "gate" each gate of
            each matrix. A threshold (``Narang``) and banks of a row share nothing.
        kinds: which weights: "weight_hh" recurrent ones, "weight_ih" those of inputs.
        regrowth: whether weights change place once they are few; the default is not at all.

    Attributes:
        masks: what is kept now, by the parameter's name in the model.
        steps: how often ``step`` was called.

    Raises:
        SparseRNNInputError: the model holds no such layer, or an option is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        pattern: Pattern | None = None,
        scope: Scope = "matrix",
        kinds: Sequence[str] = ("weight_hh",),
        regrowth: RigL | None = None,
    ):
        if scope not in SCOPES:
            raise SparseRNNInputError(f"scope is {scope!r}; legal: {', '.join(SCOPES)}")
        if not kinds or not set(kinds) <= {"weight_hh", "weight_ih"}:
            raise SparseRNNInputError(f"kinds are {kinds!r}; legal: weight_hh, weight_ih, or both")
        self.schedule = schedule
        self.pattern = pattern or Unstructured()
        self.scope = scope
        self.regrowth = regrowth
        self.steps = 0
        self._gates = dict(_find(model, kinds))
        if not self._gates:
            raise SparseRNNInputError(
                f"{type(model).__name__} holds no torch.nn.RNN, LSTM, GRU or cell of them to prune"
            )
        self._weights = {name: model.get_parameter(name) for name in self._gates}
        self.masks = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self._weights.items()
        }
        self._gradients: dict[str, Tensor] = {}
        self._hooks = [w.register_hook(self._hook(name)) for name, w in self._weights.items()]

    def step(self) -> None:
        """Count a step; make masks anew where the schedule says so; put zeros where they belong."""
        with torch.no_grad():
            if self.schedule.due(self.steps):
                self._prune()
            elif self._regrows(self.steps):
                self._regrow()
            for name, weight in self._weights.items():
                weight.mul_(self.masks[name])
        self._gradients.clear()
        self.steps += 1

    @property
    def density(self) -> float:
        """Share of all values under the masks that is kept."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / max(sum(mask.numel() for mask in self.masks.values()), 1)

    def remove(self) -> None:
        """Let go of the model; its zeros stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on: the number of steps and the masks."""
        return {"steps": self.steps, "masks": {k: v.clone() for k, v in self.masks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another pruner of the same model was.

        Raises:
            SparseRNNInputError: the masks are of another model.
        """
        shapes = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        ours = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        if shapes != ours:
            raise SparseRNNInputError(f"masks are of {shapes}, this model has {ours}")
        self.steps = state["steps"]
        self.masks = {
            name: mask.to(self._weights[name].device) for name, mask in state["masks"].items()
        }

    def _prune(self) -> None:
        # Of what is kept so far: what is gone has no score and does not come back.
        scores = {n: torch.where(self.masks[n], w.abs(), 0) for n, w in self._weights.items()}
        density = self.schedule.density_at(self.steps)
        if density is None:
            threshold = self.schedule.threshold_at(self.steps)
            for name, score in scores.items():
                self.masks[name] = self.pattern.above(score, threshold)
            return
        if self.scope == "global":
            found = self.pattern.select(list(scores.values()), density)
            self.masks = dict(zip(scores, found, strict=True))
            return
        for name, score in scores.items():
            parts = self._parts(name, score)
            self.masks[name] = torch.cat([self.pattern.select([p], density)[0] for p in parts])

    def _regrows(self, step: int) -> bool:
        return self.regrowth is not None and self.regrowth.due(step)

    def _regrow(self) -> None:
        if self.regrowth is None:
            return
        fraction = self.regrowth.fraction_at(self.steps)
        for name, gradient in self._gradients.items():
            tensors = (self._weights[name], gradient, self.masks[name])
            parts = zip(*(self._parts(name, x) for x in tensors), strict=True)
            grown = [regrow(w, g, m, fraction, self.pattern) for w, g, m in parts]
            mask = torch.cat(grown)
            # What comes back begins at zero.
            self._weights[name].mul_(mask & self.masks[name])
            self.masks[name] = mask

    def _parts(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self._gates[name]) if self.scope == "gate" else (tensor,)

    def _hook(self, name: str) -> Any:
        def masked(gradient: Tensor) -> Tensor:
            if self._regrows(self.steps):
                seen = self._gradients.get(name)
                self._gradients[name] = gradient.clone() if seen is None else seen + gradient
            return gradient * self.masks[name]

        return masked


def _find(model: nn.Module, kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Names of the weights to prune and their numbers of gates."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if name.startswith(tuple(kinds)) and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{prefix}.{name}".removeprefix("."), weight.shape[0] // module.hidden_size
