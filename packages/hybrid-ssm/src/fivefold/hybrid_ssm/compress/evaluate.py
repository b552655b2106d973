"""How close a smaller model is to its parent and to the text, layer by layer.

Legend: B sequences, S tokens, H hidden width, V vocabulary, N tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.compress.stream import Stream
from fivefold.hybrid_ssm.memory import Context, make_context
from fivefold.hybrid_ssm.model import Layer
from fivefold.hybrid_ssm.pattern import ATTENTION

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Quality:
    """What is measured on validation text.

    Attributes:
        accuracy: share of tokens whose next one is the likeliest.
        agreement: share at which it is the parent's likeliest.
        loss: cross entropy, nats a token.
        kl: forward divergence from the parent, nats a token.
    """

    accuracy: float
    agreement: float
    loss: float
    kl: float

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences to run: ids and targets (B, S), and their documents."""

    ids_bs: Tensor
    targets_bs: Tensor
    context: Context


def batch_of(parts: Sequence[Tensor], pattern: str, device: torch.device) -> Batch:
    """A batch of ids, targets and, where documents are packed, their starts."""
    ids, targets, *starts = (part.to(device) for part in parts)
    shape = (ids.shape[0], ids.shape[1])
    context = make_context(
        shape, starts=starts[0] if starts else None, has_attention=ATTENTION in pattern
    )
    return Batch(ids, targets, context)


@torch.no_grad()
def run_layers(stream: Stream, layers: Iterable[Layer], batches: Sequence[Batch]) -> list[Tensor]:
    """Hidden states before the output layer (B, S, H) of each batch; each layer is needed once.

    Args:
        stream: of the model that embeds and ends, a student's being its parent's.
        layers: the student's, in order.
        batches: what to run.
    """
    hidden = [stream.embed(batch.ids_bs) for batch in batches]
    for layer in layers:
        hidden = [layer(x, batch.context) for x, batch in zip(hidden, batches, strict=True)]
    tail = stream.tail()
    return [tail.hidden(x) for x in hidden]


@torch.no_grad()
def measure(
    head: Any, hidden: Sequence[Tensor], parent_hidden: Sequence[Tensor], batches: Sequence[Batch],
    parent_head: Any = None,
) -> Quality:  # fmt: skip
    """Compare a model with the text and with its parent.

    Args:
        head: output layer.
        hidden: what it sees, of each batch (B, S, H).
        parent_hidden: what the parent's sees.
        batches: with the targets; those of ``IGNORED`` count nowhere.
        parent_head: the parent's output layer; None where it is the same.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for x, parent, batch in zip(hidden, parent_hidden, batches, strict=True):
        for row in range(len(x)):  # logits of one sequence at a time
            valid = batch.targets_bs[row] != IGNORED
            of_parent = (parent_head or head)(parent[row][valid])
            sums += _sums(head(x[row][valid]), of_parent, batch.targets_bs[row][valid])
    right, same, loss, kl, count = sums.tolist()
    return Quality(right / count, same / count, loss / count, kl / count)


def _sums(logits_nv: Tensor, parent_nv: Tensor, targets_n: Tensor) -> Tensor:
    log_p = logits_nv.double().log_softmax(-1)
    log_q = parent_nv.double().log_softmax(-1)
    guess_n = logits_nv.argmax(-1)
    values = (
        (guess_n == targets_n).sum(),
        (guess_n == parent_nv.argmax(-1)).sum(),
        -log_p.gather(1, targets_n.unsqueeze(1)).sum(),
        (log_q.exp() * (log_q - log_p)).sum(),
        torch.tensor(len(targets_n)),
    )
    return torch.stack([value.double().cpu() for value in values])


def ranked(qualities: Sequence[Quality]) -> list[int]:
    """Places of candidates from the best: the sum of their ranks by accuracy and by agreement.

    The paper ranks by both and does not say how; of equal sums the lower divergence goes first.
    """

    def places(values: Sequence[float]) -> list[int]:
        return [sum(other > value for other in values) for value in values]

    accuracy = places([each.accuracy for each in qualities])
    agreement = places([each.agreement for each in qualities])
    return sorted(
        range(len(qualities)), key=lambda i: (accuracy[i] + agreement[i], qualities[i].kl, i)
    )
