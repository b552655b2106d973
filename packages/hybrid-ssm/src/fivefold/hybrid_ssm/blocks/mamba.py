"""The Mamba-2 mixer: projections, causal convolution, selective scan, gated norm.

Dao and Gu, arXiv 2405.21060, as Nemotron-H has it (arXiv 2504.03624): the gate comes before the
norm, which is of groups of channels, and the width is heads times head width.

Legend: B sequences, S tokens here, H heads, P width of a head, G groups, N length of a state,
K channels (of x, then of B and C), W taps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.blocks.heads import Heads, HeadValues
from fivefold.hybrid_ssm.cache import MambaState
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.memory import ALONE, Context
from fivefold.hybrid_ssm.norm import GatedNorm
from fivefold.hybrid_ssm.ops.causal_conv1d import causal_conv1d
from fivefold.hybrid_ssm.ops.conv_update import conv_update, conv_update_
from fivefold.hybrid_ssm.ops.ssd_scan import ssd_scan
from fivefold.hybrid_ssm.ops.state_update import state_update, state_update_
from fivefold.hybrid_ssm.packed import Packed
from fivefold.kernels import Linear
from fivefold.parallel_core.linear_group import LinearGroup


@dataclass(frozen=True, slots=True)
class Rules:
    """What the scan is told beside tensors.

    Attributes:
        head_dim: P.
        state_size: N.
        dt_limit: lowest and highest time step.
    """

    head_dim: int
    state_size: int
    dt_limit: tuple[float, float]


class MambaCore(nn.Module):
    """Convolution and scan: everything in Mamba-2 that looks across positions.

    The seam of context parallelism. It has no parameters of its own.
    """

    def __init__(self, rules: Rules):
        super().__init__()
        self.rules = rules

    def forward(
        self,
        x_bsk: Tensor,
        b_bsk: Tensor,
        c_bsk: Tensor,
        dt_bsh: Tensor,
        values: HeadValues,
        context: Context = ALONE,
        state: MambaState | None = None,
    ) -> Tensor:
        """Channels of x, B and C and the raw time steps to the channels of y (B, S, H*P).

        Args:
            x_bsk: (B, S, H*P).
            b_bsk: (B, S, G*N).
            c_bsk: (B, S, G*N).
            dt_bsh: (B, S, H), before bias and softplus.
            values: parameters of these heads.
            context: padding and documents.
            state: of the tokens before; left as after these.
        """
        is_step = x_bsk.shape[1] == 1 and context.mask is None
        if is_step and state is not None and state.ssm is not None:
            return self._step(x_bsk, b_bsk, c_bsk, dt_bsh, values, state)
        if context.packed is not None and state is not None:
            return self._packed((x_bsk, b_bsk, c_bsk, dt_bsh), values, context.packed, state)
        if context.mask is not None:
            # Padding is nothing: no input to the convolution, and below none to the state.
            mask = context.mask.unsqueeze(-1)
            x_bsk, b_bsk, c_bsk = (each * mask for each in (x_bsk, b_bsk, c_bsk))
        before = None if state is None else state.conv
        x_bsk, b_bsk, c_bsk, after = self.convolve((x_bsk, b_bsk, c_bsk), values, context, before)
        if context.mask is not None:
            x_bsk = x_bsk * context.mask.unsqueeze(-1)
        y_bsk, last = self.scan(
            (x_bsk, b_bsk, c_bsk, dt_bsh), values, context, None if state is None else state.ssm
        )
        if state is not None:
            state.conv, state.ssm = after, last
        return y_bsk

    def convolve(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        values: HeadValues,
        context: Context = ALONE,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, B and C through their taps and SiLU, and the last inputs of all (B, W - 1, K)."""
        sizes = [each.shape[-1] for each in inputs]
        states = (None,) * 3 if before is None else before.split(sizes, dim=-1)
        outs, lasts = [], []
        for each, weight, bias, initial in zip(
            inputs, values.weights, values.biases, states, strict=True
        ):
            out, last = causal_conv1d(
                each,
                weight,
                bias,
                activation="silu",
                initial_state=initial,
                seq_ids=context.seq_ids,
                return_final_state=True,
            )
            outs.append(out)
            lasts.append(last)
        return outs[0], outs[1], outs[2], torch.cat(lasts, dim=-1)

    def scan(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        values: HeadValues,
        context: Context = ALONE,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, B, C and dt to y (B, S, H*P) and the last state (B, H, P, N)."""
        x_bsk, b_bsk, c_bsk, dt_bsh = inputs
        y_bshp, last = ssd_scan(
            x_bsk.unflatten(-1, (-1, self.rules.head_dim)),
            dt_bsh,
            values.decay,
            b_bsk.unflatten(-1, (-1, self.rules.state_size)),
            c_bsk.unflatten(-1, (-1, self.rules.state_size)),
            D=values.skip,
            dt_bias=values.dt_bias,
            dt_softplus=True,
            dt_limit=self.rules.dt_limit,
            initial_state=before,
            seq_ids=context.seq_ids,
            return_final_state=True,
        )
        return y_bshp.flatten(-2), last

    def _packed(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        values: HeadValues,
        packed: Packed,
        state: MambaState,
    ) -> Tensor:
        """Documents one after the other; ``state`` is left as after the last token of each."""
        parts = [packed.cut(each) for each in inputs]
        outs, afters, lasts = [], [], []
        for x, b, c, dt in zip(*parts, strict=True):
            x, b, c, after = self.convolve((x, b, c), values)
            y, last = self.scan((x, b, c, dt), values)
            outs.append(y)
            afters.append(after)
            lasts.append(last)
        state.conv, state.ssm = torch.cat(afters), torch.cat(lasts)
        return packed.join(outs, len(inputs[0]))

    def _step(
        self,
        x_b1k: Tensor,
        b_b1k: Tensor,
        c_b1k: Tensor,
        dt_b1h: Tensor,
        values: HeadValues,
        state: MambaState,
    ) -> Tensor:
        """One token, from ``state`` to ``state``; in place where nothing needs a gradient."""
        inputs = (x_b1k, b_b1k, c_b1k)
        sizes = [each.shape[-1] for each in inputs]
        (weight, bias), x_bk = values.joined(), torch.cat(inputs, dim=-1)[:, 0]
        if torch.is_grad_enabled():
            x_bk, state.conv = conv_update(state.conv, x_bk, weight, bias, activation="silu")  # type: ignore[arg-type]
        else:
            x_bk = conv_update_(state.conv, x_bk, weight, bias, activation="silu")  # type: ignore[arg-type]
        x_bk, b_bk, c_bk = x_bk.split(sizes, dim=-1)
        arguments = (
            x_bk.unflatten(-1, (-1, self.rules.head_dim)),
            dt_b1h[:, 0],
            values.decay,
            b_bk.unflatten(-1, (-1, self.rules.state_size)),
            c_bk.unflatten(-1, (-1, self.rules.state_size)),
        )
        options = {
            "D": values.skip,
            "dt_bias": values.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.rules.dt_limit,
        }
        if torch.is_grad_enabled():
            y_bhp, state.ssm = state_update(state.ssm, *arguments, **options)  # type: ignore[arg-type]
        else:
            y_bhp = state_update_(state.ssm, *arguments, **options)  # type: ignore[arg-type]
        return y_bhp.flatten(-2).unsqueeze(1)


class MambaMixer(nn.Module):
    """Projections, convolution, scan and gated norm.

    Attributes:
        in_proj: z, x, B, C and dt of one input.
        heads: parameters of the convolution and the scan.
        core: seam; convolution and scan.
        norm: of y times silu(z), in groups.
        out_proj: back to the hidden width.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        shared = config.num_groups * config.state_size
        widths = {
            "z": config.mamba_width,
            "x": config.mamba_width,
            "b": shared,
            "c": shared,
            "dt": config.num_mamba_heads,
        }
        hidden, bias = config.hidden_size, config.use_bias
        self.in_proj = LinearGroup(
            {name: Linear(hidden, width, bias=bias) for name, width in widths.items()}
        )
        self.heads = Heads(config)
        self.core = MambaCore(Rules(config.mamba_head_dim, config.state_size, config.dt_limit))
        self.norm = GatedNorm(config.mamba_width, config.num_groups, config.norm_eps)
        self.out_proj = Linear(config.mamba_width, hidden, bias=bias)

    def forward(self, x_bsh: Tensor, context: Context = ALONE, name: str = "") -> Tensor:
        """Hidden states (B, S, H) to (B, S, H); the layer's name finds its part of the cache."""
        z, x, b, c, dt = self.in_proj(x_bsh)
        state = None if context.cache is None else context.cache.state(name)
        y = self.core(x, b, c, dt, self.heads(), context, state)
        return self.out_proj(self.norm(y, z))
