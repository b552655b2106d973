"""Causal self attention with grouped queries and without positions.

Legend: B sequences, S queries here, T keys, D width of a head, H hidden width.
"""

from torch import Tensor, nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.memory import ALONE, Context
from fivefold.kernels import Linear, attention
from fivefold.parallel_core.documents import Documents
from fivefold.parallel_core.linear_group import LinearGroup


class AttentionCore(nn.Module):
    """Softmax attention of queries over the keys up to their own position.

    The seam of context parallelism: everything in attention that looks across positions.
    """

    def forward(
        self,
        q_bshd: Tensor,
        k_bthd: Tensor,
        v_bthd: Tensor,
        query_start: int | None = None,
        documents: Documents | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q_bshd: (B, S, query heads, D).
            k_bthd: keys of positions 0 to T - 1, (B, T, key heads, D); the query heads are a
                multiple of the key heads, and consecutive ones share a key head.
            v_bthd: values, like the keys.
            query_start: position of the first query; the default puts the last query at the
                last key.
            documents: of these tokens, where several are packed into a row; work and memory are
                then those of the documents.
            key_mask: (B, T), False at keys that nobody sees.

        Returns:
            (B, S, query heads, D); zeros where a query sees no key.
        """
        if documents is not None:
            return documents.attend(self.partial, q_bshd, k_bthd, v_bthd)
        start = k_bthd.shape[1] - q_bshd.shape[1] if query_start is None else query_start
        if q_bshd.shape[1] == 1 and start == k_bthd.shape[1] - 1:
            return self._last(q_bshd, k_bthd, v_bthd, key_mask)
        return self._attend(q_bshd, k_bthd, v_bthd, start, key_mask)[0]

    def partial(
        self, q_bshd: Tensor, k_bthd: Tensor, v_bthd: Tensor, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Attend to some of the keys, to be put together with what the others give.

        Args:
            q_bshd: as in ``forward``.
            k_bthd: as in ``forward``.
            v_bthd: as in ``forward``.
            offset: query i sees key j where j <= i + offset.

        Returns:
            (B, S, query heads, D), and the log-sum-exp of the scores (B, S, query heads).
        """
        return self._attend(q_bshd, k_bthd, v_bthd, offset, None)

    def _last(self, q_b1hd: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """One query that sees all keys, (B, 1, query heads, D).

        The heads that share a key head are as many queries of it, so that a kernel reads the keys
        once and no copy of them is made for every head.
        """
        shared_bgrd = q_b1hd[:, 0].unflatten(1, (k.shape[2], -1))
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        return attention(shared_bgrd, keys, values, key_mask=key_mask).flatten(1, 2).unsqueeze(1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, offset: int, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attention(
            q, k, v, key_mask=key_mask, is_causal=True, causal_offset=offset, return_lse=True
        )
        return out.transpose(1, 2), lse.transpose(1, 2)


class Attention(nn.Module):
    """Projections around an ``AttentionCore``.

    The number of heads is what the projections give, so a rank may hold some of the heads.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.qkv = LinearGroup(
            {
                "q_proj": Linear(config.hidden_size, query_width, bias=False),
                "k_proj": Linear(config.hidden_size, key_width, bias=False),
                "v_proj": Linear(config.hidden_size, key_width, bias=False),
            }
        )
        self.core = AttentionCore()
        self.o_proj = Linear(query_width, config.hidden_size, bias=False)

    def forward(self, x_bsh: Tensor, context: Context = ALONE, name: str = "") -> Tensor:
        """Hidden states (B, S, H) to (B, S, H); the layer's name finds its part of the cache."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_bsh))
        if context.cache is not None and context.packed is not None:
            out = self.core(q, k, v, documents=context.documents)
            k, v = (context.packed.aligned(each, context.packed.longest) for each in (k, v))
            context.cache.keys_values(name).append(k, v, 0)
        elif context.cache is not None:
            k, v = context.cache.keys_values(name).append(k, v, context.start)
            out = self.core(q, k, v, context.start, key_mask=context.key_mask)
        elif context.key_mask is not None:
            out = self.core(q, k, v, 0, key_mask=context.key_mask)
        else:
            out = self.core(q, k, v, documents=context.documents)
        return self.o_proj(out.flatten(-2))
