"""Rotations, translations and unit quaternions.

Products of three by three matrices are written as sums: a GPU would otherwise round them to TF32
where that is switched on, and coordinates do not survive that.

Legend: any leading dims; i and j rows and columns of a rotation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rigid:
    """Rigid transforms ``x -> rotation @ x + translation``.

    Attributes:
        rotation: (..., 3, 3)
        translation: (..., 3)
    """

    rotation: Tensor
    translation: Tensor

    @classmethod
    def from_points(
        cls, on_negative_x: Tensor, origin: Tensor, on_xy_plane: Tensor, eps: float = 1e-8
    ) -> "Rigid":
        """Frames through three points each (supplement, algorithm 21).

        Args:
            on_negative_x: (..., 3) on the first axis, behind the origin.
            origin: (..., 3)
            on_xy_plane: (..., 3) on the side of the positive second axis.
            eps: under the square roots, so that points that coincide give no NaN.
        """
        x = _unit(origin - on_negative_x, eps)
        plane = on_xy_plane - origin
        y = _unit(plane - (plane * x).sum(-1, keepdim=True) * x, eps)
        return cls(torch.stack((x, y, torch.linalg.cross(x, y)), -1), origin)

    @classmethod
    def from_4x4(cls, matrix: Tensor) -> "Rigid":
        """Transforms from (..., 4, 4) homogeneous matrices."""
        return cls(matrix[..., :3, :3], matrix[..., :3, 3])

    @classmethod
    def from_flat12(cls, flat: Tensor) -> "Rigid":
        """Transforms from (..., 12): the rotation row by row, then the translation."""
        return cls(flat[..., :9].unflatten(-1, (3, 3)), flat[..., 9:])

    @classmethod
    def from_affine(cls, affine: Tensor) -> "Rigid":
        """Transforms from (..., 7): a unit quaternion, then the translation."""
        return cls(quaternion_to_rotation(affine[..., :4]), affine[..., 4:])

    def flat12(self) -> Tensor:
        """(..., 12): the rotation row by row, then the translation."""
        return torch.cat((self.rotation.flatten(-2), self.translation), -1)

    def unsqueeze(self, dim: int) -> "Rigid":
        """A new leading dim, counted from the last of them when negative."""
        return Rigid(
            self.rotation.unsqueeze(dim - 2 if dim < 0 else dim),
            self.translation.unsqueeze(dim - 1 if dim < 0 else dim),
        )

    def apply(self, points: Tensor) -> Tensor:
        """Points (..., 3) moved out of these frames."""
        return rotate(self.rotation, points) + self.translation

    def invert_apply(self, points: Tensor) -> Tensor:
        """Points (..., 3) as seen from these frames."""
        return rotate(self.rotation.mT, points - self.translation)

    def compose(self, other: "Rigid") -> "Rigid":
        """``other`` first, then this."""
        return Rigid(
            matmul3(self.rotation, other.rotation),
            rotate(self.rotation, other.translation) + self.translation,
        )

    def inverse(self) -> "Rigid":
        """The transforms that undo these."""
        back = self.rotation.mT
        return Rigid(back, -rotate(back, self.translation))

    def scaled(self, factor: float) -> "Rigid":
        """Translations in another unit of length."""
        return Rigid(self.rotation, self.translation * factor)


def rotate(rotation: Tensor, points: Tensor) -> Tensor:
    """``rotation @ points`` for (..., 3, 3) and (..., 3)."""
    return (rotation * points.unsqueeze(-2)).sum(-1)


def matmul3(left: Tensor, right: Tensor) -> Tensor:
    """Products of (..., 3, 3) matrices."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of unit quaternions (..., 4), real part first."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rotation_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) of rotations (..., 3, 3), real part first and not negative.

    The eigenvector of the largest eigenvalue of a symmetric matrix, which stays exact near half
    turns (Bar-Itzhack 2000).
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    rows = (
        (xx + yy + zz, zy - yz, xz - zx, yx - xy),
        (zy - yz, xx - yy - zz, xy + yx, xz + zx),
        (xz - zx, xy + yx, yy - xx - zz, yz + zy),
        (yx - xy, xz + zx, yz + zy, zz - xx - yy),
    )
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2) / 3
    quaternion = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def multiply_by_vector(quaternion: Tensor, vector: Tensor) -> Tensor:
    """Quaternion (..., 4) times a quaternion whose real part is 0 and whose rest is (..., 3)."""
    w, x, y, z = quaternion.unbind(-1)
    a, b, c = vector.unbind(-1)
    parts = (
        -x * a - y * b - z * c,
        w * a + y * c - z * b,
        w * b + z * a - x * c,
        w * c + x * b - y * a,
    )
    return torch.stack(parts, -1)
