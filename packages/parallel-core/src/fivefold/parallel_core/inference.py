"""A whole batch through a parallel model: whole ids in, whole logits out, on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fivefold.parallel_core.collectives import gather_along
from fivefold.parallel_core.context import gather_held, take_held
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology


@torch.no_grad()
def whole_logits(
    model: nn.Module,
    topology: Topology,
    ids: Tensor,
    *,
    vocab_size: int,
    hidden_size: int,
    split: Split = "contiguous",
) -> Tensor:
    """Logits of a batch on every rank of a model that is laid over the ranks.

    Every rank of one data-parallel replica calls it with the same ids; all ranks call it together,
    as experts may be spread over replicas.

    Args:
        model: this rank's pipeline stage, without FSDP.
        topology: the ranks.
        ids: (B, S) token ids; S a multiple of tp·cp.
        vocab_size: true ids, without padding.
        hidden_size: width of what goes from stage to stage.
        split: of the sequence over "cp", as in the model's plan.

    Returns:
        (B, S, V).

    Raises:
        ConfigError: the sequence does not divide.
    """
    tp, cp, pp = (topology.axis(name) for name in ("tp", "cp", "pp"))
    if ids.shape[1] % (tp.size * cp.size):
        raise ConfigError(
            f"sequences of {ids.shape[1]} tokens cannot be split over tp*cp = "
            f"{tp.size * cp.size}; pad them to a multiple"
        )
    dtype = next(model.parameters()).dtype
    x = take_held(ids, cp, split)
    if pp.rank > 0:
        shape = (ids.shape[0], ids.shape[1] // (tp.size * cp.size), hidden_size)
        x = torch.empty(shape, dtype=dtype, device=topology.device)
        dist.recv(x, src=pp.ranks[pp.rank - 1], group=pp.group)
    x = model(x).contiguous()
    if pp.rank < pp.size - 1:
        dist.send(x, dst=pp.ranks[pp.rank + 1], group=pp.group)
        x = torch.empty((*ids.shape, vocab_size), dtype=dtype, device=topology.device)
    else:
        x = gather_along(x, tp, 2)[..., :vocab_size]
        x = gather_held(x, cp, split).contiguous()
    if pp.group is not None:
        dist.broadcast(x, src=pp.ranks[-1], group=pp.group)
    return x
