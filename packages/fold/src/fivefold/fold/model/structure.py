"""The structure module (supplement, algorithms 20 to 24).

Coordinates inside are in units of ``position_scale`` angstrom; what is returned is in angstrom.

Legend: any leading dims, N residues, L layers, C channels, H heads, D width, P points.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.fold.config import StructureConfig
from fivefold.fold.geometry.atoms import atom14_to_atom37, frames_to_atom14, torsion_frames
from fivefold.fold.geometry.rigid import (
    Rigid,
    multiply_by_vector,
    quaternion_to_rotation,
    rotate,
)
from fivefold.fold.geometry.tables import tables
from fivefold.fold.model.primitives import LayerNorm, Linear


class InvariantPointAttention(nn.Module):
    """Attention by channels, pairs and distances of points (algorithm 22).

    Args:
        config: of the structure module.
        c_s: channels of the single representation.
        c_z: of the pair representation.
    """

    def __init__(self, config: StructureConfig, c_s: int, c_z: int):
        super().__init__()
        heads, width = config.num_heads, config.head_width
        self.num_heads, self.width = heads, width
        self.num_query_points, self.num_value_points = (
            config.num_query_points,
            config.num_value_points,
        )
        points = config.num_query_points + config.num_value_points
        self.linear_q = Linear(c_s, heads * width)
        self.linear_kv = Linear(c_s, heads * 2 * width)
        self.linear_q_points = Linear(c_s, heads * 3 * config.num_query_points)
        self.linear_kv_points = Linear(c_s, heads * 3 * points)
        self.linear_b = Linear(c_z, heads)
        # Softplus of it is 1.
        self.head_weights = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))
        self.linear_out = Linear(
            heads * (width + 4 * config.num_value_points + c_z), c_s, init="zero"
        )

    def reset_parameters(self) -> None:
        """All heads look at distances equally."""
        nn.init.constant_(self.head_weights, math.log(math.e - 1))

    def forward(self, s: Tensor, z: Tensor, frames: Rigid, mask: Tensor) -> Tensor:
        """The update of s (..., N, C).

        Args:
            s: single representation (..., N, C).
            z: pair representation (..., N, N, C).
            frames: of the residues (..., N).
            mask: (..., N) 1 for what is there.
        """
        key, value = self._heads(self.linear_kv(s)).split(self.width, -1)
        query_points = self._points(self.linear_q_points(s), frames)
        key_points, value_points = self._points(self.linear_kv_points(s), frames).split(
            (self.num_query_points, self.num_value_points), -2
        )
        scores = self._scalar_scores(self._heads(self.linear_q(s)), key)
        scores = scores + self._point_scores(query_points, key_points)
        scores = scores + math.sqrt(1 / 3) * self.linear_b(z).movedim(-1, -3)
        both = (mask.unsqueeze(-1) * mask.unsqueeze(-2)).unsqueeze(-3)
        p_hij = torch.softmax(scores - 1e5 * (1 - both), -1)
        return self.linear_out(torch.cat((
            (p_hij @ value).transpose(-2, -3).flatten(-2),
            *self._seen_points(p_hij, value_points, frames),
            (p_hij.transpose(-2, -3) @ z).flatten(-2),
        ), -1))  # fmt: skip

    def _heads(self, x: Tensor) -> Tensor:
        """(..., N, H D) to (..., H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def _points(self, x: Tensor, frames: Rigid) -> Tensor:
        """Projections (..., N, 3 H P), x, y and z one after the other, to points (..., H, N, P, 3).

        They leave the frame of their residue.
        """
        local = x.unflatten(-1, (3, -1)).mT
        moved = frames.unsqueeze(-1).apply(local)
        return moved.unflatten(-2, (self.num_heads, -1)).transpose(-3, -4)

    def _scalar_scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., H, N, N), of a third of the variance that queries and keys of variance 1 have."""
        return (query * math.sqrt(1 / (3 * self.width))) @ key.mT

    def _point_scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., H, N, N): less the squared distances of points (..., H, N, P, 3)."""
        apart = query.flatten(-2).unsqueeze(-2) - key.flatten(-2).unsqueeze(-3)
        # The variance of the squared distance of a pair of points is 9/2.
        weight = F.softplus(self.head_weights) * math.sqrt(2 / (27 * self.num_query_points))
        return -0.5 * weight[:, None, None] * apart.square().sum(-1)

    def _seen_points(self, p_hij: Tensor, points: Tensor, frames: Rigid) -> list[Tensor]:
        """Mean points as seen from each residue (..., N, H P): x, y, z and their length."""
        mean = (p_hij @ points.flatten(-2)).unflatten(-1, (-1, 3))
        mean = mean.transpose(-3, -4).flatten(-3, -2)
        local = frames.unsqueeze(-1).invert_apply(mean)
        length = (local.square().sum(-1) + 1e-8).sqrt()
        return [*local.unbind(-1), length]


class StructureTransition(nn.Module):
    """Layers between attention and the update of the backbone (algorithm 20, lines 8 and 9).

    Args:
        c_s: channels.
        num_layers: how many.
        dropout: after them.
    """

    def __init__(self, c_s: int, num_layers: int, dropout: float):
        super().__init__()
        last = num_layers - 1
        self.layers = nn.ModuleList(
            Linear(c_s, c_s, init="zero" if number == last else "relu")
            for number in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = LayerNorm(c_s)

    def forward(self, s: Tensor) -> Tensor:
        """The s (..., N, C) after them."""
        hidden = self.layers[0](s)
        for layer in self.layers[1:]:
            hidden = layer(F.relu(hidden))
        return self.layer_norm(self.dropout(s + hidden))


class BackboneUpdate(nn.Module):
    """A small rotation and translation in a residue's own frame (algorithm 23).

    Args:
        c_s: channels of the single representation.
    """

    def __init__(self, c_s: int):
        super().__init__()
        self.linear = Linear(c_s, 6, init="zero")

    def forward(self, s: Tensor, quaternion: Tensor, frames: Rigid) -> tuple[Tensor, Tensor]:
        """The new unit quaternions (..., N, 4) and translations (..., N, 3)."""
        turn, shift = self.linear(s).split(3, -1)
        turned = quaternion + multiply_by_vector(quaternion, turn)
        turned = turned / turned.norm(dim=-1, keepdim=True)
        return turned, frames.translation + rotate(frames.rotation, shift)


class TorsionPredictor(nn.Module):
    """The seven torsions of each residue (algorithm 20, lines 11 to 14).

    Args:
        config: of the structure module.
        c_s: channels of the single representation.
    """

    def __init__(self, config: StructureConfig, c_s: int):
        super().__init__()
        c = config.c_torsion
        self.linear_in = Linear(c_s, c)
        self.linear_initial = Linear(c_s, c)
        self.blocks = nn.ModuleList(_TorsionBlock(c) for _ in range(config.num_torsion_blocks))
        self.linear_out = Linear(c, 14)

    def forward(self, s: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Sines and cosines (..., N, 7, 2), and the same before they had length 1."""
        a = self.linear_in(F.relu(s)) + self.linear_initial(F.relu(initial))
        for block in self.blocks:
            a = block(a)
        raw = self.linear_out(F.relu(a)).unflatten(-1, (7, 2))
        length = raw.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        return raw / length, raw


class _TorsionBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.linear_1 = Linear(channels, channels, init="relu")
        self.linear_2 = Linear(channels, channels, init="zero")

    def forward(self, a: Tensor) -> Tensor:
        return a + self.linear_2(F.relu(self.linear_1(F.relu(a))))


class StructureModule(nn.Module):
    """From representations to atoms (algorithm 20).

    Args:
        config: of the structure module.
        c_s: channels of the single representation.
        c_z: of the pair representation.
    """

    def __init__(self, config: StructureConfig, c_s: int, c_z: int):
        super().__init__()
        self.num_layers, self.scale = config.num_layers, config.position_scale
        self.layer_norm_s = LayerNorm(c_s)
        self.layer_norm_z = LayerNorm(c_z)
        self.linear_in = Linear(c_s, c_s)
        self.ipa = InvariantPointAttention(config, c_s, c_z)
        self.ipa_dropout = nn.Dropout(config.dropout)
        self.layer_norm_ipa = LayerNorm(c_s)
        self.transition = StructureTransition(c_s, config.num_transition_layers, config.dropout)
        self.backbone_update = BackboneUpdate(c_s)
        self.torsions = TorsionPredictor(config, c_s)

    def forward(self, s: Tensor, z: Tensor, aatype: Tensor, mask: Tensor) -> dict[str, Any]:
        """Atoms and how they came about, named as in AlphaFold 2.

        Args:
            s: single representation (..., N, C).
            z: pair representation (..., N, N, C).
            aatype: (..., N)
            mask: (..., N) 1 for what is there.
        """
        initial, z = self.layer_norm_s(s), self.layer_norm_z(z)
        s = self.linear_in(initial)
        quaternion = s.new_zeros(*s.shape[:-1], 4)
        quaternion[..., 0] = 1
        frames = Rigid(quaternion_to_rotation(quaternion), s.new_zeros(*s.shape[:-1], 3))
        layers = []
        for _ in range(self.num_layers):
            s = self.layer_norm_ipa(self.ipa_dropout(s + self.ipa(s, z, frames, mask)))
            s = self.transition(s)
            quaternion, translation = self.backbone_update(s, quaternion, frames)
            frames = Rigid(quaternion_to_rotation(quaternion), translation)
            layers.append(self._layer(s, initial, aatype, quaternion, frames))
            # Gradients of later layers would turn earlier ones by ever longer chains.
            quaternion = quaternion.detach()
            frames = Rigid(frames.rotation.detach(), translation)
        return self._outputs(s, aatype, layers)

    def _layer(
        self, s: Tensor, initial: Tensor, aatype: Tensor, quaternion: Tensor, frames: Rigid
    ) -> dict[str, Tensor]:
        """What one iteration says: backbone, torsions, frames of rigid groups and atoms."""
        angles, raw = self.torsions(s, initial)
        backbone = frames.scaled(self.scale)
        groups = torsion_frames(aatype, backbone, angles)
        return {
            "traj": torch.cat((quaternion, backbone.translation), -1),
            "angles_sin_cos": angles,
            "unnormalized_angles_sin_cos": raw,
            "frames": groups.flat12(),
            "atom_pos": frames_to_atom14(aatype, groups),
        }

    def _outputs(
        self, s: Tensor, aatype: Tensor, layers: list[dict[str, Tensor]]
    ) -> dict[str, Any]:
        """All layers (L, ...) and the atoms of the last."""
        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        trajectory = stacked.pop("traj")
        atom14 = stacked["atom_pos"][-1]
        known = tables(s.device, s.dtype)
        return {
            "act": s,
            "traj": trajectory,
            "final_affines": trajectory[-1],
            "sidechains": stacked,
            "final_atom14_positions": atom14,
            "final_atom14_mask": known.atom14_exists[aatype],
            "final_atom_positions": atom14_to_atom37(aatype, atom14),
            "final_atom_mask": known.atom37_exists[aatype],
        }
