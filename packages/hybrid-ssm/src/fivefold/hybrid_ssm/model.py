"""A hybrid language model of Mamba-2, attention, MLP and expert layers, on one device.

Nemotron-H, arXiv 2504.03624: one residual around each layer, no positions anywhere.

Legend: B sequences, S tokens of a sequence here, H hidden width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.blocks.attention import Attention
from fivefold.hybrid_ssm.blocks.mamba import MambaMixer
from fivefold.hybrid_ssm.blocks.mlp import MLP
from fivefold.hybrid_ssm.cache import HybridCache
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError, HybridInputError
from fivefold.hybrid_ssm.generate import generate
from fivefold.hybrid_ssm.initial import DRAWN, head_values, rule
from fivefold.hybrid_ssm.loss import TokenLoss
from fivefold.hybrid_ssm.memory import ALONE, Context, make_context
from fivefold.hybrid_ssm.norm import RMSNorm
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, MAMBA
from fivefold.hybrid_ssm.pretrained import Pretrained
from fivefold.kernels import Linear
from fivefold.parallel_core.documents import starts_of_ids
from fivefold.parallel_core.losses import SideOutputs


class Layer(nn.Module):
    """One mixer behind a norm, added to its input.

    Args:
        config: the model's.
        index: of the layer.
        side: where experts put their losses and counts.
    """

    def __init__(self, config: HybridConfig, index: int, side: SideOutputs):
        super().__init__()
        self.name = str(index)
        self.wide = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = _mixer(config, index, side)

    def forward(self, x_bsh: Tensor, context: Context = ALONE) -> Tensor:
        """Hidden states (B, S, H) to (B, S, H)."""
        narrow = self.norm(x_bsh.to(self.norm.weight.dtype)) if self.wide else self.norm(x_bsh)
        return x_bsh + self.mixer(narrow, context, self.name)


def _mixer(config: HybridConfig, index: int, side: SideOutputs) -> nn.Module:
    kind = config.pattern[index]
    if kind == MAMBA:
        return MambaMixer(config)
    if kind == ATTENTION:
        return Attention(config)
    if kind != EXPERTS:
        return MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
    try:
        from fivefold.hybrid_ssm.blocks.experts import ExpertsMixer
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("fivefold.moe"):
            raise
        raise HybridConfigError(
            f"layer {index} of pattern {config.pattern!r} has experts, which need fivefold-moe: "
            "pip install 'fivefold-hybrid-ssm[moe]'"
        ) from None
    return ExpertsMixer(config, index, side)


def _starts(seq_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(seq_ids.shape) != shape or seq_ids.is_floating_point():
        raise HybridInputError(
            f"seq_ids are {seq_ids.dtype} of shape {tuple(seq_ids.shape)}; they must be integers "
            f"of the tokens' shape, {shape}"
        )
    return starts_of_ids(seq_ids)


class HybridForCausalLM(Pretrained):
    """Token ids in, logits of the next token out.

    A pipeline stage is the same module with the parts it does not hold set to None or taken out
    of ``layers``; it then reads or returns hidden states instead.

    Args:
        config: the model's shape. Weights are drawn from ``initialisation`` with torch's global
            generator, unless the model is made on the meta device.

    Attributes:
        side: losses and counts of all layers, see ``SideOutputs``.
        layers: by their global index.
        loss: seam; sum of the tokens' cross entropies.

    >>> config = HybridConfig(vocab_size=100, hidden_size=32, pattern="M-M*-", num_mamba_heads=4,
    ...                       mamba_head_dim=16, state_size=16, num_groups=2, intermediate_size=48,
    ...                       num_attention_heads=4)
    >>> HybridForCausalLM(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """

    recompute_regions: ClassVar[Mapping[str, str]] = {
        "attention_core": "layers.*.mixer.core",
        "mixers": "layers.*.mixer",
        "norms": "layers.*.norm",
        "layer": "layers.*",
    }

    embed_tokens: nn.Embedding | None
    norm: RMSNorm | None
    lm_head: nn.Linear | None

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.side = SideOutputs()
        self.has_attention = ATTENTION in config.pattern
        device = torch.get_default_device()
        # On meta first: modules draw their own weights when made, and the model draws them anew.
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleDict(
                {str(i): Layer(config, i, self.side) for i in range(config.num_layers)}
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
        cache: HybridCache | None = None,
        *,
        attention_mask: Tensor | None = None,
        seq_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Run the layers that are here.

        Args:
            x: token ids (B, S), or hidden states (B, S, H) where ``embed_tokens`` is None.
            cache: memory of the tokens before these; extended by these.
            attention_mask: (B, S) of these tokens, 0 at padding; as it has no positions, the model
                gives the others the same logits as without padding.
            seq_ids: integers (B, S); tokens of one row see only those of their own id, which lie
                side by side: packed documents. An empty cache then gets each document as a
                sequence of its own, in order, as if they had come padded on the left.
            document_starts: the same said in another way, which holds for parts of sequences too:
                for each token the position, in the whole sequence, of its document's first.
            logits_to_keep: logits of so many last tokens only, of each document where they are
                packed into a cache; 0 is all.

        Returns:
            Logits (B, S, V), or hidden states (B, S, H) where ``lm_head`` is None; of the last
            tokens of packed documents (documents, tokens, V).

        Raises:
            HybridInputError: shapes that do not fit, no room in the cache, or documents together
                with padding or with a cache that has tokens.
        """
        shape = (x.shape[0], x.shape[1])
        if seq_ids is not None:
            document_starts = _starts(seq_ids, shape)
        context = make_context(shape, cache, attention_mask, document_starts, self.has_attention)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers.values():
            x = layer(x, context)
        if cache is not None:
            cache.advance(context.num_tokens(shape[1]))
        return self._logits(context.last(x, logits_to_keep) if logits_to_keep else x)

    def _logits(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x.to(self.norm.weight.dtype) if self.config.residual_in_fp32 else x)
        return x if self.lm_head is None else self.lm_head(x)

    def generate(
        self, input_ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Continue texts (B, S) to (B, S + max_new_tokens) at most.

        See ``fivefold.hybrid_ssm.generate.generate``, whose options this takes.
        """
        return generate(self, input_ids, max_new_tokens, **options)

    def initialisation(self, name: str) -> tuple[str, float]:
        """How the parameter or buffer called ``name`` starts; see ``initial.rule``."""
        return rule(self.config, name)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all that is here anew, with torch's global generator."""
        for name, parameter in (*self.named_parameters(), *self.named_buffers()):
            kind, deviation = self.initialisation(name)
            if parameter.is_meta:
                continue
            if name.endswith(DRAWN):
                seed = int(torch.randint(2**31, ()))
                parameter.copy_(head_values(self.config, name, seed))
            elif kind == "normal":
                parameter.normal_(0.0, deviation)
            else:
                parameter.fill_(1.0 if kind == "ones" else 0.0)

    def after_step(self, totals: Mapping[str, Tensor]) -> None:
        """Let the routers here move their biases towards balance.

        Args:
            totals: side outputs of a step, summed over microbatches and ranks.
        """
        for name, layer in self.layers.items():
            load_e = totals.get(f"load.{name}")
            if load_e is not None:
                layer.get_submodule("mixer.router").after_step(load_e)  # type: ignore[operator]

    def tie_weights(self) -> None:
        """Make the output layer the embedding again, which moving off the meta device undoes."""
        if not self.config.tie_word_embeddings:
            return
        if self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight
