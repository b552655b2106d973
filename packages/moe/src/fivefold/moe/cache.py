"""Keys and values of the tokens so far, for generation.

Legend: B sequences, T positions, D width of a head.
"""

from torch import Tensor

from fivefold.moe.errors import MoEInputError


class LayerCache:
    """Keys and values of one attention layer, in memory taken once for ``max_length`` tokens."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self._keys_bthd: Tensor | None = None
        self._values_bthd: Tensor | None = None

    def append(self, k_bshd: Tensor, v_bshd: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns the keys and values of all tokens so far (B, T, heads, D).

        Raises:
            MoEInputError: there is no room for them.
        """
        stop = self.length + k_bshd.shape[1]
        if stop > self.max_length:
            raise MoEInputError(
                f"the cache has room for {self.max_length} tokens and holds {self.length}; "
                f"{k_bshd.shape[1]} more do not fit"
            )
        if self._keys_bthd is None or self._values_bthd is None:
            # Shaped by the first keys: a rank may hold only some of the heads.
            shape = (k_bshd.shape[0], self.max_length, *k_bshd.shape[2:])
            self._keys_bthd, self._values_bthd = k_bshd.new_empty(shape), v_bshd.new_empty(shape)
        self._keys_bthd[:, self.length : stop] = k_bshd
        self._values_bthd[:, self.length : stop] = v_bshd
        self.length = stop
        return self._keys_bthd[:, :stop], self._values_bthd[:, :stop]


class KVCache:
    """One ``LayerCache`` for each attention layer of a model.

    Args:
        max_length: longest sequence, prompt and new tokens together.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self._layers: dict[str, LayerCache] = {}

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return min((layer.length for layer in self._layers.values()), default=0)

    def layer(self, name: str) -> LayerCache:
        """The cache of the layer called ``name``."""
        return self._layers.setdefault(name, LayerCache(self.max_length))
