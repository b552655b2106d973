"""The products of float8 values, which come from the package above that has the kernels.

Legend: M rows, K features summed over, N features of the result, E experts, T rows of all experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LinearProduct(Protocol):
    """A linear layer whose operands it rounds itself, with its gradients."""

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        grad_dtype: torch.dtype,
        power_of_2_scale: bool,
    ) -> Tensor:
        """``input`` (..., K), ``weight`` (N, K) and ``bias`` (N,) to (..., N)."""
        ...


class GroupedProduct(Protocol):
    """Products of groups of rows, as ``torch.nn.functional.grouped_mm``, with scales."""

    def __call__(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        *,
        offs: Tensor,
        out_dtype: torch.dtype | None = None,
        scale_a: Tensor | None = None,
        scale_b: Tensor | None = None,
    ) -> Tensor:
        """(T, K) x (E, K, N) of operands to divide by their scales, or (M, T) x (T, N) without."""
        ...


@dataclass(frozen=True, slots=True)
class Products:
    """What computes.

    Attributes:
        linear: a layer of one rank.
        grouped_mm: everything that several ranks or experts share.
    """

    linear: LinearProduct
    grouped_mm: GroupedProduct

    def matrix(
        self, a_mk: Tensor, scale_a: Tensor, b_nk: Tensor, scale_b: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """``a @ b.T`` (M, N) of float8 values divided by their scales; sums in at least float32."""
        if a_mk.is_cuda:
            ends = torch.full((1,), a_mk.shape[0], dtype=torch.int32, device=a_mk.device)
            return self.rows(a_mk, scale_a, b_nk.unsqueeze(0).mT, scale_b, ends, dtype)
        wide = wide_enough(dtype)
        return torch.mm(a_mk.to(wide) / scale_a, (b_nk.to(wide) / scale_b).t()).to(dtype)

    def rows(
        self,
        a_tk: Tensor,
        scale_a: Tensor,
        b_ekn: Tensor,
        scale_b: Tensor,
        ends_e: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Float8 rows of each expert times its matrix, divided by the scales (T, N)."""
        return self.grouped_mm(
            a_tk, b_ekn, offs=ends_e, out_dtype=dtype, scale_a=scale_a, scale_b=scale_b
        )

    def outer(
        self,
        a_tn: Tensor,
        scale_a: Tensor,
        b_tk: Tensor,
        scale_b: Tensor,
        ends_e: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """``a.T @ b`` of each expert's float8 rows, divided by the scales (E, N, K)."""
        wide = wide_enough(dtype)
        # Float8 values are exact in bfloat16.
        exact = torch.bfloat16 if a_tn.is_cuda else wide
        out = self.grouped_mm(a_tn.to(exact).mT, b_tk.to(exact), offs=ends_e, out_dtype=wide)
        return (out / (scale_a.to(wide) * scale_b.to(wide))).to(dtype)


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """What products of values of ``dtype`` are summed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
