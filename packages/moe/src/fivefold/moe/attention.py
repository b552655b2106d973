"""Causal self attention: grouped queries, rotary positions, sliding window.

Legend: B sequences, S queries here, T keys, D width of a head, H hidden width.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fivefold.kernels import Linear, attention
from fivefold.moe.cache import LayerCache
from fivefold.moe.config import MoEConfig
from fivefold.moe.norm import RMSNorm
from fivefold.parallel_core.documents import Documents
from fivefold.parallel_core.linear_group import LinearGroup

Rotation = Callable[[Tensor], Tensor]


class AttentionCore(nn.Module):
    """Softmax attention of queries over the keys up to their own position.

    The seam of context parallelism: everything in attention that looks across positions.
    """

    def __init__(self, sliding_window: int | None = None):
        super().__init__()
        self.sliding_window = sliding_window

    def forward(
        self,
        q_bshd: Tensor,
        k_bthd: Tensor,
        v_bthd: Tensor,
        query_start: int | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q_bshd: (B, S, query heads, D).
            k_bthd: keys of positions 0 to T - 1, (B, T, key heads, D); the query heads are a
                multiple of the key heads, and consecutive ones share a key head.
            v_bthd: values, like the keys.
            query_start: position of the first query; the default puts the last query at the
                last key.
            documents: packed in each sequence, where there are several; none sees another.

        Returns:
            (B, S, query heads, D).
        """
        if documents is not None:
            return documents.attend(self.partial, q_bshd, k_bthd, v_bthd)
        start = k_bthd.shape[1] - q_bshd.shape[1] if query_start is None else query_start
        first, stop = self._visible(start, q_bshd.shape[1])
        k_bthd, v_bthd = k_bthd[:, first:stop], v_bthd[:, first:stop]
        return self._attend(q_bshd, k_bthd, v_bthd, start - first)[0]

    def partial(
        self, q_bshd: Tensor, k_bthd: Tensor, v_bthd: Tensor, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Attend to some of the keys, to be put together with what the others give.

        Args:
            q_bshd: as in ``forward``.
            k_bthd: as in ``forward``.
            v_bthd: as in ``forward``.
            offset: query i sees key j where j <= i + offset, within the window.

        Returns:
            (B, S, query heads, D), and the log-sum-exp of the scores (B, S, query heads).
        """
        return self._attend(q_bshd, k_bthd, v_bthd, offset)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attention(
            q,
            k,
            v,
            is_causal=True,
            causal_offset=offset,
            window=self.sliding_window,
            return_lse=True,
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def _visible(self, start: int, num_queries: int) -> tuple[int, int]:
        """First and one past the last key position that any of the queries sees."""
        window = self.sliding_window
        first = 0 if window is None else max(0, start + 1 - window)
        return first, start + num_queries


class Attention(nn.Module):
    """Projections and rotary positions around an ``AttentionCore``.

    The number of heads is what the projections give, so a rank may hold some of the heads.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        widths = {"q_proj": query_width, "k_proj": key_width, "v_proj": key_width}
        self.qkv = LinearGroup(
            {
                name: Linear(config.hidden_size, width, bias=config.qkv_bias)
                for name, width in widths.items()
            }
        )
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore(config.sliding_window)
        self.o_proj = Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        x_bsh: Tensor,
        rotate: Rotation,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Hidden states (B, S, H) to (B, S, H), reading and extending ``cache`` if there is one."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_bsh))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(self.core(q, k, v, documents=documents).flatten(-2))
