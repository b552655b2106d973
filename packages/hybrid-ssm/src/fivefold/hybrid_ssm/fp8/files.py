"""Model folders in FP8 as NVIDIA's Model-Optimizer writes them, which serving programs read.

A weight is E4M3 with one scale, ``weight_scale``, that it is multiplied with again; where
activations were measured, ``input_scale`` says the same of the input. Reading is
``HybridForCausalLM.from_pretrained``, which applies the scales.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.card import model_card
from fivefold.hybrid_ssm.files import disk_specs, disk_tensors, saved_tensors
from fivefold.hybrid_ssm.fp8.apply import chosen_products
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.hybrid_ssm.hf import Stored, stored_tensors
from fivefold.hybrid_ssm.pretrained import CARD, CONFIG, GENERATION, QUANTISATION
from fivefold.parallel_core import hub
from fivefold.parallel_core.fp8.scaling import E4M3, SMALLEST_AMAX
from fivefold.parallel_core.hub.writer import Spec

if TYPE_CHECKING:
    from fivefold.hybrid_ssm.model import HybridForCausalLM

Maxima = Mapping[str, float]
"""Largest magnitude of the input of each module, by its name in our model."""


@torch.no_grad()
def calibrate(model: "HybridForCausalLM", batches: Iterable[Tensor]) -> dict[str, float]:
    """Largest magnitude of what goes into each linear layer.

    Args:
        model: whole.
        batches: token ids (B, S).

    Returns:
        By the layer's name, over all batches. Routed experts are not among them.
    """
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().amax()))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(watch(name))
                hooks.callback(handle.remove)
        for ids_bs in batches:
            model(ids_bs)
    return found


def save_fp8(
    model: "HybridForCausalLM",
    folder: str | Path,
    maxima: Maxima | None = None,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> tuple[str, ...]:
    """Write a model with the projections of its layers in FP8.

    Args:
        model: whole.
        folder: made if missing; a model card that is there is kept.
        maxima: of ``calibrate``, for scales of inputs; without, a reader measures them itself.
        max_shard_size: of one safetensors file.
        options: of ``FP8Config``: the first and last layers that stay as they are.

    Returns:
        Names on disk of the tensors in FP8.
    """
    folder = Path(folder)
    chosen = {stored.name: stored for stored in _chosen(model, FP8Config(**options))}
    inputs = _input_scales(chosen, maxima or {})
    saved = saved_tensors(model)
    dtypes = {name: tensor.dtype for name, tensor in saved.items()}
    specs = _specs(disk_specs(model.config, dtypes), chosen, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        hub.atomic_write_text(folder / CARD, model_card(model.config))
    described = model.config.to_hf()
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hub.write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    tensors = disk_tensors(model.config, saved.items())
    hub.write_sharded(folder, specs, _rounded(tensors, chosen, inputs), max_shard_size)
    quantisation = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    left = _left(model, chosen)
    hub.write_json(
        folder / QUANTISATION,
        {
            "producer": {"name": "modelopt", "version": "fivefold"},
            "quantization": {**quantisation, "exclude_modules": left},
        },
    )
    wide = str(model.lm_head.weight.dtype if model.lm_head else "bfloat16").removeprefix("torch.")
    config = {"quant_method": "modelopt", **quantisation, "ignore": left}
    hub.write_json(folder / CONFIG, described | {"dtype": wide, "quantization_config": config})
    return tuple(chosen)


def _chosen(model: "HybridForCausalLM", config: FP8Config) -> Iterator[Stored]:
    """The matrices on disk of the products that FP8 is for."""
    prefixes = tuple(
        f"layers.{layer}.mixer.{name}"
        for layer, parts in chosen_products(model.config, config).items()
        for part in parts
        for name in part
        if config.experts or name != "experts"
    )
    for stored in stored_tensors(model.config):
        ours = stored.parts[0].name
        if stored.name.endswith(".weight") and any(ours.startswith(f"{p}.") for p in prefixes):
            yield stored


def _input_scales(chosen: Mapping[str, Stored], maxima: Maxima) -> dict[str, float]:
    most = torch.finfo(E4M3).max
    modules = {
        name: stored.parts[0].name.removesuffix(".weight") for name, stored in chosen.items()
    }
    return {
        name: max(maxima[module], SMALLEST_AMAX) / most
        for name, module in modules.items()
        if module in maxima
    }


def _specs(
    specs: list[Spec], chosen: Mapping[str, Stored], inputs: Mapping[str, float]
) -> list[Spec]:
    found: list[Spec] = []
    for name, shape, dtype in specs:
        found.append((name, shape, E4M3 if name in chosen else dtype))
        if name in chosen:
            found.append((_scale_name(name, "weight"), (), torch.float32))
        if name in inputs:
            found.append((_scale_name(name, "input"), (), torch.float32))
    return found


def _scale_name(name: str, what: str) -> str:
    return f"{name.removesuffix('.weight')}.{what}_scale"


def _rounded(
    tensors: Iterable[tuple[str, Tensor]],
    chosen: Mapping[str, Stored],
    inputs: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    most = torch.finfo(E4M3).max
    for name, tensor in tensors:
        if name not in chosen:
            yield name, tensor
            continue
        amax = tensor.abs().amax().to(torch.float64).clamp(min=SMALLEST_AMAX)
        scale = (amax / most).to(torch.float32)
        # Division, as a reader multiplies; the scale is what it reads, rounded to float32.
        yield name, (tensor.to(torch.float32) / scale).clamp(-most, most).to(E4M3)
        yield _scale_name(name, "weight"), scale
        if name in inputs:
            yield _scale_name(name, "input"), torch.tensor(inputs[name], dtype=torch.float32)


def _left(model: "HybridForCausalLM", chosen: Mapping[str, Stored]) -> list[str]:
    """Modules on disk with matrices that are not in FP8, as readers want them named."""
    names = [
        stored.name.removesuffix(".weight")
        for stored in stored_tensors(model.config)
        if stored.name.endswith(".weight") and len(stored.shape) > 1 and stored.name not in chosen
    ]
    return sorted(names)
