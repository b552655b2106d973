"""A second oracle: the model as a recurrence over tokens, in float64, from its files' tensors.

Nothing of it is shared with the package or with transformers. One token of one sequence at a time,
one head at a time.

Legend: T tokens so far, D width of a head, N length of a state.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fivefold.hybrid_ssm import HybridConfig


def logits_by_recurrence(
    config: HybridConfig, tensors: Mapping[str, Tensor], ids: list[int]
) -> Tensor:
    """Logits (S, V) of one sequence."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    layers = [
        _KINDS[letter](config, weights, f"backbone.layers.{i}.mixer.")
        for i, letter in enumerate(config.pattern)
    ]
    rows = []
    for token in ids:
        x = weights["backbone.embeddings.weight"][token]
        for i, layer in enumerate(layers):
            norm = weights[f"backbone.layers.{i}.norm.weight"]
            x = x + layer.step(_rms(x, config.norm_eps) * norm)
        x = _rms(x, config.norm_eps) * weights["backbone.norm_f.weight"]
        rows.append(weights["lm_head.weight"] @ x)
    return torch.stack(rows)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt()


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


class _Mamba:
    def __init__(self, config: HybridConfig, weights: Mapping[str, Tensor], prefix: str):
        self.config = config
        self.w = {
            name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)
        }
        shape = (config.num_mamba_heads, config.mamba_head_dim, config.state_size)
        self.state = torch.zeros(shape, dtype=torch.float64)
        self.inputs: list[Tensor] = []

    def step(self, u: Tensor) -> Tensor:
        c, w = self.config, self.w
        width, shared = c.mamba_width, c.num_groups * c.state_size
        z, xbc, dt = (w["in_proj.weight"] @ u).split((width, width + 2 * shared, c.num_mamba_heads))
        self.inputs.append(xbc)
        conv = w["conv1d.bias"].clone()
        for back, value in enumerate(reversed(self.inputs[-c.conv_width :])):
            conv += w["conv1d.weight"][:, 0, -1 - back] * value
        x, b, q = _silu(conv).split((width, shared, shared))
        outs = []
        for head in range(c.num_mamba_heads):
            group = head * c.num_groups // c.num_mamba_heads
            at = slice(group * c.state_size, (group + 1) * c.state_size)
            x_d = x[head * c.mamba_head_dim : (head + 1) * c.mamba_head_dim]
            step = (1 + (dt[head] + w["dt_bias"][head]).exp()).log().clamp(*c.dt_limit)
            decay = (-w["A_log"][head].exp() * step).exp()
            self.state[head] = decay * self.state[head] + step * torch.outer(x_d, b[at])
            outs.append(self.state[head] @ q[at] + w["D"][head] * x_d)
        gated = torch.cat(outs) * _silu(z)
        normed = [_rms(part, c.norm_eps) for part in gated.chunk(c.num_groups)]
        return w["out_proj.weight"] @ (torch.cat(normed) * w["norm.weight"])


class _Attention:
    def __init__(self, config: HybridConfig, weights: Mapping[str, Tensor], prefix: str):
        self.config = config
        self.q, self.k, self.v, self.o = (weights[f"{prefix}{n}_proj.weight"] for n in "qkvo")
        self.seen: list[tuple[Tensor, Tensor]] = []

    def step(self, u: Tensor) -> Tensor:
        c = self.config
        q, k, v = ((w @ u).view(-1, c.head_dim) for w in (self.q, self.k, self.v))
        self.seen.append((k, v))
        outs = []
        for head in range(c.num_attention_heads):
            shared = head * c.num_key_value_heads // c.num_attention_heads
            keys = torch.stack([k[shared] for k, _ in self.seen])
            values = torch.stack([v[shared] for _, v in self.seen])
            outs.append((keys @ q[head] / c.head_dim**0.5).softmax(0) @ values)
        return self.o @ torch.cat(outs)


class _Mlp:
    def __init__(self, config: HybridConfig, weights: Mapping[str, Tensor], prefix: str):
        self.up, self.down = (weights[f"{prefix}{n}_proj.weight"] for n in ("up", "down"))

    def step(self, u: Tensor) -> Tensor:
        return self.down @ (self.up @ u).clamp(min=0).square()


class _Experts:
    def __init__(self, config: HybridConfig, weights: Mapping[str, Tensor], prefix: str):
        self.config, self.weights, self.prefix = config, weights, prefix
        self.shared = _Mlp(config, weights, f"{prefix}shared_experts.")

    def step(self, u: Tensor) -> Tensor:
        c, w, p = self.config, self.weights, self.prefix
        scores = (w[f"{p}gate.weight"] @ u).sigmoid()
        biased = (scores + w[f"{p}gate.e_score_correction_bias"]).tolist()
        size = c.num_experts // c.num_expert_groups
        groups = [biased[i : i + size] for i in range(0, c.num_experts, size)]
        worth = [sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda i: -worth[i])[: c.num_chosen_groups]
        legal = [i for i in range(c.num_experts) if i // size in best]
        chosen = sorted(legal, key=lambda i: -biased[i])[: c.num_experts_per_token]
        total = scores[chosen].sum() if c.normalise_weights else 1.0
        inner = w[f"{p}fc1_latent_proj.weight"] @ u if c.latent_size else u
        routed = torch.zeros_like(inner)
        for i in chosen:
            expert = _Mlp(c, w, f"{p}experts.{i}.")
            routed += scores[i] / total * c.routed_scaling_factor * expert.step(inner)
        if c.latent_size:
            routed = w[f"{p}fc2_latent_proj.weight"] @ routed
        return routed + self.shared.step(u)


_KINDS = {"M": _Mamba, "*": _Attention, "-": _Mlp, "E": _Experts}
