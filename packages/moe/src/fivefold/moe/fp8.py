"""Training in FP8: one scale for a tensor, from its present values.

Legend: E experts here, T rows (token copies), F expert width, H hidden width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fivefold.kernels import fp8_linear, grouped_mm, swiglu
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.experts import Experts
from fivefold.moe.fp8_config import FP8Config
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.fp8.convert import Conversion
from fivefold.parallel_core.fp8.grouped import grouped_linear
from fivefold.parallel_core.fp8.products import Products
from fivefold.parallel_core.fp8.scaling import E4M3, E5M2, Format
from fivefold.parallel_core.topology import Axis, Topology

if TYPE_CHECKING:
    from fivefold.moe.model import MoEForCausalLM

__all__ = ["FP8Config", "FP8Experts", "recipe"]

PRODUCTS = Products(linear=fp8_linear, grouped_mm=grouped_mm)
_PROJECTIONS = (
    "attention.qkv",
    "attention.o_proj",
    "mlp.gate_up",
    "mlp.down",
    "mlp.shared.gate_up",
    "mlp.shared.down",
)


class FP8Experts(Experts):
    """``Experts`` in FP8, with scales of the experts and rows of all ranks that share them.

    Attributes:
        ranks: that hold other experts or parts of their width; None where this one holds all.
        format: how tensors are rounded.
        products: what computes.
    """

    ranks: Axis | None
    format: Format
    products: Products

    def forward(self, x_th: Tensor, counts_e: Tensor) -> Tensor:
        """As in the base: rows sorted by expert (T, H) and their counts (E,) to (T, H)."""
        ends_e = counts_e.cumsum(0).to(torch.int32)
        how = (ends_e, self.ranks, self.format, self.products)
        packed = grouped_linear(x_th, self.gate_up.flatten(1, 2), *how)
        return grouped_linear(swiglu(packed), self.down, *how)


def recipe(
    model: "MoEForCausalLM", topology: Topology | None = None, **options: Any
) -> tuple[str, ...]:
    """Make the projections and experts of a model's layers compute in FP8, in place.

    Call it last: after ``build`` or ``parallelize``, and on each pipeline stage. Parameters, their
    names and what holds of them stay; only the products change, forward and backward. A tensor
    that ranks hold together has one scale, that of the whole of it.

    Args:
        model: whole, or what a rank holds of it.
        topology: the ranks that it lies over; needed where there are several.
        options: of ``FP8Config``.

    Returns:
        The names of the modules that compute in FP8 now.

    Raises:
        MoEConfigError: nothing would be left for FP8, a module has no FP8 form (it was made FP8
            before, say), or the topology is missing.

    >>> from fivefold.moe import MoEConfig, MoEForCausalLM
    >>> model = MoEForCausalLM(MoEConfig(vocab_size=9, hidden_size=8, num_layers=2,
    ...     num_attention_heads=2, expert_intermediate_size=8, num_experts=2,
    ...     num_experts_per_token=1))
    >>> recipe(model, first=1)
    ('layers.1.attention.qkv', 'layers.1.attention.o_proj', 'layers.1.mlp.experts')
    """
    config = FP8Config(**options)
    config.check(model.config.num_layers)
    form = Format(E4M3 if config.gradients == "e4m3" else E5M2, config.power_of_2_scale)
    conversion = Conversion(form, PRODUCTS, topology, {Experts: FP8Experts})
    try:
        conversion.check(model)
        names = list(_chosen(model, config))
        for name in names:
            conversion.change(model.get_submodule(name), name)
    except ConfigError as error:
        raise MoEConfigError(str(error)) from error
    return tuple(names)


def _chosen(model: "MoEForCausalLM", config: FP8Config) -> Iterator[str]:
    """Names of the modules of the layers here that become FP8."""
    stop = model.config.num_layers - config.last
    wanted = (*_PROJECTIONS, "mlp.experts") if config.experts else _PROJECTIONS
    for key, layer in model.layers.items():
        there = {name for name, _ in layer.named_modules()}
        if config.first <= int(key) < stop:
            yield from (f"layers.{key}.{name}" for name in wanted if name in there)
