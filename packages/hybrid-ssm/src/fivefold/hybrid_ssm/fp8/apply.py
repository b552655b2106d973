"""Which products of a hybrid become FP8."""

from typing import TYPE_CHECKING, Any

from torch import nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.hybrid_ssm.fp8.linears import FP8ColumnParallel, FP8Linear, FP8RowParallel, How
from fivefold.hybrid_ssm.fp8.scaling import E4M3, E5M2, Format
from fivefold.hybrid_ssm.pattern import EXPERTS
from fivefold.parallel_core.linear_group import LinearGroup
from fivefold.parallel_core.tensor_parallel import ColumnParallelLinears, RowParallelLinear
from fivefold.parallel_core.topology import Axis, Topology

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
    _check_topology(model, topology)
    chosen = chosen_products(model.config, config)
    changed: list[str] = []
    for key, layer in model.layers.items():
        mixer = layer.get_submodule("mixer")
        # Each once: routed experts are one module of both products.
        names = dict.fromkeys(name for part in chosen.get(int(key), ()) for name in part)
        for name in names:
            if _has(mixer, name) and (config.experts or name != "experts"):
                changed.append(f"layers.{key}.mixer.{name}")
                _change(mixer.get_submodule(name), changed[-1], config, topology)
    return tuple(changed)


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


def _check_topology(model: nn.Module, topology: Topology | None) -> None:
    """Refuse to take parts of tensors for the whole of them."""
    kinds = (ColumnParallelLinears, RowParallelLinear)
    axes = [module.axis for module in model.modules() if isinstance(module, kinds)]
    split = next((axis for axis in axes if axis.size > 1), None)
    if split is not None and topology is None:
        raise HybridConfigError(
            f"the model lies over {split.name} of {split.size} ranks, and their topology is "
            "missing; give it: recipe(model, topology, ...)"
        )


def _has(module: nn.Module, name: str) -> bool:
    found = dict(module.named_modules()).get(name)
    return found is not None and not isinstance(found, nn.Identity)


def _change(module: nn.Module, name: str, config: FP8Config, topology: Topology | None) -> None:
    form = Format(E4M3 if config.gradients == "e4m3" else E5M2, config.power_of_2_scale)
    if type(module) is LinearGroup:
        for key, linear in module.named_children():
            _change(linear, f"{name}.{key}", config, topology)
    elif type(module) is nn.Linear:
        _become(module, FP8Linear, how=_replicated(form, topology))
    elif type(module) is ColumnParallelLinears:
        whole = module.sequence
        how = How(module.axis, form, gather=whole, x=whole, weight=True, y=True)
        _become(module, FP8ColumnParallel, how=how)
    elif type(module) is RowParallelLinear:
        _become(module, FP8RowParallel, how=How(module.axis, form, x=True, weight=True))
    elif name.endswith(".experts"):
        _change_experts(module, name, form, topology)
    else:
        raise _no_form(name, module)


def _no_form(name: str, module: nn.Module) -> HybridConfigError:
    return HybridConfigError(
        f"{name!r} is a {type(module).__name__}, which has no FP8 form; the recipe takes "
        "nn.Linear, LinearGroup, ColumnParallelLinears, RowParallelLinear and Relu2Experts, once"
    )


def _replicated(form: Format, topology: Topology | None) -> How:
    """Whole weights on every rank, which see parts of the sequence where there are several."""
    axis = None if topology is None else topology.axis("tp")
    return How(axis, form, x=True, y=True)


def _change_experts(module: nn.Module, name: str, form: Format, topology: Topology | None) -> None:
    # Here and not above: fivefold-moe is an extra, which a model without experts does not need.
    from fivefold.hybrid_ssm.blocks.experts import Relu2Experts
    from fivefold.hybrid_ssm.fp8.experts import FP8Experts

    if _kind(module) is not Relu2Experts:
        raise _no_form(name, module)
    ranks: Axis | None = None if topology is None else topology.axis("etp-ep")
    _become(module, FP8Experts, ranks=ranks, format=form)


def _kind(module: nn.Module) -> type:
    """The module's class, or the one under a class of FSDP, which computes nothing itself."""
    kind = type(module)
    wrapped = len(kind.__bases__) == 2 and "forward" not in vars(kind)
    return kind.__bases__[1] if wrapped else kind


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Change a module's class, and so what it computes; all it holds stays."""
    old = type(module)
    if _kind(module) is not old:
        rest = {key: value for key, value in vars(old).items() if key == "__deepcopy__"}
        kind = type(f"FSDP{kind.__name__}", (old.__bases__[0], kind), rest)
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
