"""A mixture-of-experts language model of the families in ``families``, on one device.

Legend: B sequences, S tokens of a sequence here, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fivefold.kernels import Linear
from fivefold.moe.attention import Attention, Rotation
from fivefold.moe.cache import KVCache, LayerCache
from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEInputError
from fivefold.moe.generate import generate
from fivefold.moe.layer import MoELayer
from fivefold.moe.loss import TokenLoss
from fivefold.moe.mlp import GatedMLP
from fivefold.moe.norm import RMSNorm
from fivefold.moe.pretrained import Pretrained
from fivefold.moe.rotary import Positions, Rotary
from fivefold.parallel_core.documents import Documents
from fivefold.parallel_core.losses import SideOutputs


class DecoderLayer(nn.Module):
    """Attention and a mixture of experts, each behind a norm and added to its input.

    ``mlp`` is one network for all tokens where the configuration says that the layer is dense.
    """

    mlp: MoELayer | GatedMLP

    def __init__(self, config: MoEConfig, layer: int, side: SideOutputs):
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        if layer in config.dense_layers:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoELayer(config, layer, side)

    def forward(
        self,
        x_bsh: Tensor,
        rotate: Rotation,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Hidden states (B, S, H) to (B, S, H)."""
        x_bsh = x_bsh + self.attention(self.input_norm(x_bsh), rotate, cache, documents)
        return x_bsh + self.mlp(self.mlp_norm(x_bsh))


class MoEForCausalLM(Pretrained):
    """Token ids in, logits of the next token out.

    A pipeline stage is the same module with the parts it does not hold set to None or taken out
    of ``layers``; it then reads or returns hidden states instead.

    Args:
        config: the model's shape. Weights are drawn from ``initialisation`` with torch's global
            generator, unless the model is made on the meta device.

    Attributes:
        side: losses and counts of all layers, see ``SideOutputs``.
        layers: decoder layers by their global index.
        positions: seam; positions of the tokens here.
        loss: seam; sum of the tokens' cross entropies.

    >>> config = MoEConfig(vocab_size=100, hidden_size=32, num_layers=2, num_attention_heads=4,
    ...                    expert_intermediate_size=48, num_experts=4, num_experts_per_token=2)
    >>> MoEForCausalLM(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """

    recompute_regions: ClassVar[Mapping[str, str]] = {
        "attention_core": "layers.*.attention.core",
        "attention": "layers.*.attention",
        "experts": "layers.*.mlp.experts",
        "moe": "layers.*.mlp",
        "norms": "layers.*.*_norm",
        "layer": "layers.*",
    }

    embed_tokens: nn.Embedding | None
    norm: RMSNorm | None
    lm_head: nn.Linear | None

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.side = SideOutputs()
        self.positions: nn.Module = Positions()
        device = torch.get_default_device()
        # On meta first: modules draw their own weights when made, and the model draws them anew.
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleDict(
                {str(i): DecoderLayer(config, i, self.side) for i in range(config.num_layers)}
            )
            self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to_empty(device=device)
        self.loss: nn.Module = TokenLoss()
        self.tie_weights()
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Run the layers that are here.

        Args:
            x: token ids (B, S), or hidden states (B, S, H) where ``embed_tokens`` is None.
            cache: keys and values of the tokens before these; extended by these.
            document_starts: where several documents are packed into a sequence, integers (B, S):
                the position of the first token of each token's document. Documents do not see each
                other, and positions count from each one's start. ``parallel_core.documents`` makes
                them from ids, lengths or end-of-text tokens.

        Returns:
            Logits (B, S, V), or hidden states (B, S, H) where ``lm_head`` is None.

        Raises:
            MoEInputError: packed documents with a cache.
            ConfigError: starts that are those of no documents.
        """
        if cache is not None and document_starts is not None:
            raise MoEInputError(
                "document_starts with a cache of keys and values, which is of one document; run "
                "the documents one by one, or without a cache"
            )
        documents = None if document_starts is None else Documents(document_starts)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        start = 0 if cache is None else cache.length
        theta = self.config.rope_theta
        rotate = Rotary(self.positions, start, self.config.rotary_dim, theta, documents)
        for name, layer in self.layers.items():
            x = layer(x, rotate, None if cache is None else cache.layer(name), documents)
        if self.norm is not None:
            x = self.norm(x)
        if self.lm_head is not None:
            x = self.lm_head(x)
        return x

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        streamer: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue texts (B, S) to (B, S + max_new_tokens) at most; see ``generate.generate``."""
        return generate(
            self,
            input_ids,
            max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            generator=generator,
            streamer=streamer,
        )

    def initialisation(self, name: str) -> tuple[str, float]:
        """How the parameter or buffer called ``name`` starts: a kind, and a deviation.

        Kinds are "ones", "zeros" and "normal".
        """
        *_, module, last = name.split(".")
        if module.endswith("norm"):
            return "ones", 0.0
        if last in ("bias", "previous_load"):
            return "zeros", 0.0
        return "normal", self.config.initializer_range

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all that is here anew, with torch's global generator."""
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            kind, deviation = self.initialisation(name)
            if kind == "normal":
                value.normal_(0.0, deviation)
            else:
                value.fill_(kind == "ones")

    def after_step(self, totals: Mapping[str, Tensor]) -> None:
        """Let the routers here learn from the load of a whole step.

        Args:
            totals: side outputs of a step, summed over microbatches and ranks.
        """
        for name, layer in self.layers.items():
            load_e = totals.get(f"load.{name}")
            if load_e is not None and isinstance(layer.mlp, MoELayer):
                layer.mlp.router.after_step(load_e)

    def tie_weights(self) -> None:
        """Make the output layer the embedding again, which moving off the meta device undoes."""
        if not self.config.tie_word_embeddings:
            return
        if self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight
