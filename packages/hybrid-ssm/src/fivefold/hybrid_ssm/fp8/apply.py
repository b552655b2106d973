"""Which products of a hybrid become FP8."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.hybrid_ssm.fp8.products import PRODUCTS
from fivefold.hybrid_ssm.pattern import EXPERTS
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.fp8.convert import Conversion
from fivefold.parallel_core.fp8.scaling import E4M3, E5M2, Format
from fivefold.parallel_core.topology import Topology

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.model import HybridForCausalLM

# The two products of a layer; what an experts layer has besides goes with the first or the second.
_FIRST = ("in_proj", "qkv", "up_proj", "shared.up_proj", "latent_in", "experts")
_SECOND = ("out_proj", "o_proj", "down_proj", "shared.down_proj", "latent_out", "experts")


def recipe(
    model: "HybridForCausalLM", topology: Topology | None = None, **options: Any
) -> tuple[str, ...]:
    """Make the projections of a model's layers compute in FP8, in place.

    Call it last: after ``build`` or ``parallelize``, and on each pipeline stage. Parameters, their
    names and what holds of them stay; only the products change, forward and backward.

    Args:
        model: whole, or what a rank holds of it.
        topology: the ranks that it lies over; needed where experts do.
        options: of ``FP8Config``.

    Returns:
        The names of the modules that compute in FP8 now.

    Raises:
        HybridConfigError: nothing would be left for FP8, a module is of a kind that has no FP8
            form (it was made FP8 before, say), or the topology is missing.

    >>> from fivefold.hybrid_ssm import HybridConfig, HybridForCausalLM
    >>> model = HybridForCausalLM(HybridConfig(vocab_size=9, hidden_size=8, pattern="---",
    ...                                        intermediate_size=16))
    >>> recipe(model, first=1, last=1)
    ('layers.1.mixer.up_proj', 'layers.1.mixer.down_proj')
    """
    config = FP8Config(**options)
    form = Format(E4M3 if config.gradients == "e4m3" else E5M2, config.power_of_2_scale)
    conversion = Conversion(form, PRODUCTS, topology, _experts(model.config))
    try:
        conversion.check(model)
        return tuple(_converted(model, config, conversion))
    except ConfigError as error:
        raise HybridConfigError(str(error)) from error


def _converted(
    model: "HybridForCausalLM", config: FP8Config, conversion: Conversion
) -> Iterator[str]:
    """Convert what ``config`` chooses, name by name."""
    chosen = chosen_products(model.config, config)
    for key, layer in model.layers.items():
        mixer = layer.get_submodule("mixer")
        # Each once: routed experts are one module of both products.
        for name in dict.fromkeys(name for part in chosen.get(int(key), ()) for name in part):
            if _has(mixer, name) and (config.experts or name != "experts"):
                conversion.change(mixer.get_submodule(name), f"layers.{key}.mixer.{name}")
                yield f"layers.{key}.mixer.{name}"


def chosen_products(model: HybridConfig, config: FP8Config) -> dict[int, list[tuple[str, ...]]]:
    """The products of each layer that become FP8, as names of submodules of the mixer.

    Raises:
        HybridConfigError: there are none.
    """
    layers = range(model.num_layers)
    products = [(layer, part) for layer in layers for part in (_FIRST, _SECOND)]
    per = 2 if config.count == "layers" else 1
    kept = products[config.first * per : len(products) - config.last * per]
    if not kept:
        total = len(products) // per
        raise HybridConfigError(
            f"first={config.first} and last={config.last} leave none of the {total} "
            f"{config.count} of {model.pattern!r} for FP8; together they must be below {total}"
        )
    chosen: dict[int, list[tuple[str, ...]]] = {}
    for layer, part in kept:
        chosen.setdefault(layer, []).append(part)
    # Both products of routed experts are one module, which is FP8 where both of them are.
    for layer, parts in chosen.items():
        if model.pattern[layer] == EXPERTS and len(parts) == 1:
            chosen[layer] = [tuple(name for name in parts[0] if name != "experts")]
    return chosen


def _has(module: nn.Module, name: str) -> bool:
    found = dict(module.named_modules()).get(name)
    return found is not None and not isinstance(found, nn.Identity)


def _experts(config: HybridConfig) -> dict[type[nn.Module], type[nn.Module]]:
    if EXPERTS not in config.pattern:
        return {}
    # Here and not above: fivefold-moe is an extra, which a model without experts does not need.
    from fivefold.hybrid_ssm.blocks.experts import Relu2Experts
    from fivefold.hybrid_ssm.fp8.experts import FP8Experts

    return {Relu2Experts: FP8Experts}
