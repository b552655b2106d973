"""Beam search: several continuations of each prompt at once, of which the likeliest is returned.

The rules are those of transformers' ``generate``, so that both find the same texts. A step takes
the likeliest candidates of all beams together; those that end compete for a place among the
finished, the others go on.

Legend: B prompts, K beams, C candidates, V vocabulary, T new tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridInputError

# Log-probability of what is not to be chosen; finite, so that sums of it stay in order.
_NEVER = -1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamRules:
    """How beams are searched; see ``generate``.

    Raises:
        HybridInputError: a value is out of range.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise HybridInputError(f"num_beams is {self.num_beams}; it must be at least 1")
        if self.early_stopping not in (True, False, "never"):
            raise HybridInputError(
                f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'"
            )

    def score(self, log_probs: Tensor, length: int) -> Tensor:
        """By which finished texts of so many new tokens are compared."""
        return log_probs / length**self.length_penalty


class Beams:
    """The beams of B prompts: those that go on and the best that have ended.

    Args:
        rules: see above.
        prompts: ids (B, S).
        max_new_tokens: where everything ends.
        ends: ids that end a text.
        pad: what ended texts are filled up with.
    """

    def __init__(
        self,
        rules: BeamRules,
        prompts: Tensor,
        max_new_tokens: int,
        ends: list[int],
        pad: int,
    ):
        device, num_prompts = prompts.device, len(prompts)
        self.rules, self.max_new_tokens, self.pad = rules, max_new_tokens, pad
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.num_new = 0
        shape = (num_prompts, rules.num_beams)
        # All beams begin alike: only the first is looked at.
        self._scores_bk = torch.full(shape, _NEVER, device=device)
        self._scores_bk[:, 0] = 0
        self._ids_bkt = torch.zeros((*shape, 0), dtype=torch.long, device=device)
        self._ended_scores_bk = torch.full(shape, _NEVER, device=device)
        self._ended_ids_bkt = torch.full(
            (*shape, max_new_tokens), pad, dtype=torch.long, device=device
        )
        self._ended_lengths_bk = torch.zeros(shape, dtype=torch.long, device=device)
        self._is_full_b = torch.zeros(num_prompts, dtype=torch.bool, device=device)
        self._may_improve_b = ~self._is_full_b
        self._all_ended = False

    def step(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next token of every beam.

        Args:
            log_probs: of all tokens after every beam (B*K, V).

        Returns:
            The tokens that the beams go on with (B*K,), and the rows of ``log_probs`` whose
            beams they follow (B*K,).
        """
        num_beams = self.rules.num_beams
        totals_bkv = log_probs.float().unflatten(0, (-1, num_beams)) + self._scores_bk[..., None]
        # Enough for all beams to go on even if every end of every beam is among the likeliest.
        count = max(2, 1 + len(self.ends)) * num_beams
        scores_bc, places_bc = totals_bkv.flatten(1).topk(count)
        parents_bc, tokens_bc = places_bc // log_probs.shape[1], places_bc % log_probs.shape[1]
        ids_bct = torch.cat((_take(self._ids_bkt, parents_bc), tokens_bc[..., None]), dim=-1)
        self.num_new += 1
        ends_bc = torch.isin(tokens_bc, self.ends)
        if self.num_new >= self.max_new_tokens:
            ends_bc = torch.ones_like(ends_bc)
        self._all_ended = bool(ends_bc.all())
        self._finish(scores_bc, ids_bct, ends_bc)

        going_bc = scores_bc + ends_bc * _NEVER
        self._scores_bk, chosen_bk = going_bc.topk(num_beams)
        self._ids_bkt = _take(ids_bct, chosen_bk)
        self._look_ahead()
        first_b = torch.arange(len(going_bc), device=going_bc.device)[:, None] * num_beams
        rows_bk = parents_bc.gather(1, chosen_bk) + first_b
        return tokens_bc.gather(1, chosen_bk).flatten(), rows_bk.flatten()

    def is_over(self) -> bool:
        """Whether nothing more can change."""
        if self._all_ended or not bool(self._may_improve_b.any()):
            return True
        return self.rules.early_stopping is True and bool(self._is_full_b.all())

    def best(self) -> Tensor:
        """The new tokens of every prompt's best text (B, T), filled up."""
        return self._ended_ids_bkt[:, 0, : int(self._ended_lengths_bk[:, 0].max())]

    def _finish(self, scores_bc: Tensor, ids_bct: Tensor, ends_bc: Tensor) -> None:
        """Let candidates that end compete with those that have; only the K likeliest may."""
        num_beams = self.rules.num_beams
        may_bc = ends_bc & self._may_improve_b[:, None]
        may_bc[:, num_beams:] = False
        if self.rules.early_stopping is True:
            may_bc = may_bc & ~self._is_full_b[:, None]
        scores_bc = self.rules.score(scores_bc, self.num_new) + ~may_bc * _NEVER
        filled_bct = self._ended_ids_bkt.new_full(
            (*ids_bct.shape[:2], self.max_new_tokens), self.pad
        )
        filled_bct[..., : self.num_new] = ids_bct
        all_scores = torch.cat((self._ended_scores_bk, scores_bc), dim=1)
        all_ids = torch.cat((self._ended_ids_bkt, filled_bct), dim=1)
        lengths_bc = torch.full_like(may_bc, self.num_new, dtype=torch.long) * may_bc
        all_lengths = torch.cat((self._ended_lengths_bk, lengths_bc), dim=1)
        self._ended_scores_bk, chosen_bk = all_scores.topk(num_beams)
        self._ended_ids_bkt = _take(all_ids, chosen_bk)
        self._ended_lengths_bk = all_lengths.gather(1, chosen_bk)
        self._is_full_b = (self._ended_lengths_bk > 0).all(dim=1)

    def _look_ahead(self) -> None:
        """Note the prompts whose beams can no longer beat the worst that has ended."""
        is_longest = self.rules.early_stopping == "never" and self.rules.length_penalty > 0
        length = self.max_new_tokens if is_longest else self.num_new
        best_b = self.rules.score(self._scores_bk[:, 0], length)
        worst_b = self._ended_scores_bk.amin(dim=1)
        self._may_improve_b = self._may_improve_b & (~self._is_full_b | (best_b > worst_b))


def _take(x_bkt: Tensor, rows_bc: Tensor) -> Tensor:
    """(B, K, T) and rows (B, C) of it to (B, C, T)."""
    return x_bkt.gather(1, rows_bc[..., None].expand(-1, -1, x_bkt.shape[2]))
