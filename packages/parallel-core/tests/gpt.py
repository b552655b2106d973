"""The block whose activations arXiv 2205.05198 counts: pre-norm GPT with dropout and GeLU.

Legend: B sequences (paper: b), S tokens (s), H hidden width (h), A heads (a).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.styles import ColumnParallel, Plan, Replicate, RowParallel

B, S, H, A = 2, 8, 16, 4


class Dropout(nn.Module):
    """Keeps a mask of one byte a value, as the paper counts; ``nn.Dropout`` on a CPU keeps more."""

    def __init__(self, p: float = 0.25):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


class Core(nn.Module):
    """Causal attention written out; (B, A, S, H/A) each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ahead", torch.ones(S, S, dtype=torch.bool).triu(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_nsd, k_ntd, v_ntd = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q_nsd, k_ntd.transpose(1, 2)) / q.shape[-1] ** 0.5
        probabilities = scores.masked_fill(self.ahead, -torch.inf).softmax(-1)
        dropped = torch.native_dropout(probabilities, 0.25, True)[0]
        return torch.bmm(dropped, v_ntd).unflatten(0, q.shape[:2])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = LinearGroup({name: nn.Linear(H, H) for name in ("q", "k", "v")})
        self.core = Core()
        self.o_proj = nn.Linear(H, H)

    def forward(self, x_bsh: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (-1, H // A)).transpose(1, 2) for y in self.qkv(x_bsh))
        return self.o_proj(self.core(*(y.contiguous() for y in heads)).transpose(1, 2).flatten(-2))


class GeLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(H)
        self.attention = Attention()
        self.attention_dropout = Dropout()
        self.mlp_norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, 4 * H)
        self.activation = GeLU()
        self.down = nn.Linear(4 * H, H)
        self.mlp_dropout = Dropout()

    def forward(self, x_bsh: Tensor) -> Tensor:
        x_bsh = x_bsh + self.attention_dropout(self.attention(self.attention_norm(x_bsh)))
        return x_bsh + self.mlp_dropout(self.down(self.activation(self.up(self.mlp_norm(x_bsh)))))


class GPT(nn.Module):
    """Layers alone: (B, S, H) to (B, S, H)."""

    recompute_regions: ClassVar = {
        "attention_core": "layers.*.attention.core",
        "mlp_activation": "layers.*.activation",
        "norms": "layers.*.mlp_norm",
        "layer": "layers.*",
    }

    def __init__(self, num_layers: int = 1):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    def forward(self, x_bsh: Tensor) -> Tensor:
        for layer in self.layers:
            x_bsh = layer(x_bsh)
        return x_bsh


def plan(sequence: bool) -> Plan:
    return {
        "layers.*.attention_norm": Replicate(sequence),
        "layers.*.attention.qkv": ColumnParallel(sequence),
        "layers.*.attention.o_proj": RowParallel(sequence),
        "layers.*.mlp_norm": Replicate(sequence),
        "layers.*.up": ColumnParallel(sequence),
        "layers.*.down": RowParallel(sequence),
    }
