"""A whole optimizer step on the CPU: clip, AdamW, exponential average; ours against torch.

python adamw_cpu.py --json adamw_cpu.json

In each round every contender steps once, in random order, on weights of its own.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.kernels import FusedAdamW
from fivefold.kernels.bench import machine
from fivefold.kernels.bench.stopwatch import CPUStopwatch

MAX_NORM, DECAY = 1.0, 0.999
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
OURS = "FusedAdamW"

Shapes = list[tuple[int, ...]]
Step = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to make a step, on weights of its own."""

    name: str
    step: Step
    params: list[nn.Parameter]
    averages: Callable[[], list[Tensor]]


def main() -> int:
    """1 where a contender computes something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=320, help="of the decoder (%(default)s)")
    parser.add_argument("--layers", type=int, default=24, help="of the decoder (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = decoder(options.width, options.layers, options.vocabulary)
    contenders = [ours(shapes), theirs(shapes, fused=False), theirs(shapes, fused=True)]
    if not agree(contenders):
        return 1
    found = measure(contenders, options.rounds, options.threads)
    show(found, shapes)
    if options.json is not None:
        content = {
            "machine": machine.describe("cpu", options.threads),
            "versions": machine.versions(()),
            "tensors": len(shapes),
            "parameters": sum(map(_numel, shapes)),
            "rounds": options.rounds,
            "contenders": found,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def decoder(width: int, layers: int, vocabulary: int) -> Shapes:
    """A few large tensors and hundreds of small ones, as in GPT-2."""
    layer: Shapes = [(width,), (width,), (3 * width, width), (3 * width,)]
    layer += [(width, width), (width,), (width,), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (width,)]


def ours(shapes: Shapes) -> Contender:
    """All in one pass."""
    params = parameters(shapes)
    optimizer = FusedAdamW(params, **OPTIONS, max_norm=MAX_NORM, ema_decay=DECAY)
    return Contender(OURS, optimizer.step, params, optimizer.ema_state)


def theirs(shapes: Shapes, *, fused: bool) -> Contender:
    """The fastest that torch has for each of the three things."""
    params = parameters(shapes)
    optimizer = torch.optim.AdamW(params, **OPTIONS, foreach=not fused, fused=fused)
    averages: list[Tensor] = []

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if averages:
            torch._foreach_lerp_(averages, params, 1 - DECAY)
        else:  # as torch.optim.swa_utils.AveragedModel begins
            averages.extend(param.detach().clone() for param in params)

    name = f"clip_grad_norm_ + AdamW({'fused' if fused else 'foreach'}=True) + _foreach_lerp_"
    return Contender(name, step, params, lambda: averages)


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """The same for all: weights of 0.02 and gradients that are clipped."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        param = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        param.grad = 1e-3 * torch.randn(shape, generator=generator)
        made.append(param)
    return made


def agree(contenders: list[Contender]) -> bool:
    """Whether three steps, which also warm up, lead all to the same weights and averages."""
    for contender in contenders:
        for _ in range(3):
            contender.step()
    first, *others = contenders
    for other in others:
        for ours, theirs in (
            (first.params, other.params),
            (first.averages(), other.averages()),
        ):
            pairs = zip(ours, theirs, strict=True)
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs):
                sys.stderr.write(f"{other.name} computes something else\n")
                return False
    return True


def measure(contenders: list[Contender], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Minimum and median of one step, in seconds by clock, and their ratio to ours."""
    stopwatch = CPUStopwatch(threads)
    times: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for contender in order.sample(contenders, len(contenders)):
            times[contender.name].append(stopwatch.time(contender.step))
    found: list[dict[str, Any]] = []
    for name, readings in times.items():
        entry: dict[str, Any] = {"name": name}
        for clock in ("cpu", "wall"):
            seconds = [reading[clock] for reading in readings]
            best, median = min(seconds), statistics.median(seconds)
            mine = found[0][clock] if found else {"minimum": best, "median": median}
            entry[clock] = {
                "minimum": best,
                "median": median,
                "ratio_of_minima": best / mine["minimum"],
                "ratio_of_medians": median / mine["median"],
            }
        found.append(entry)
    return found


def show(found: list[dict[str, Any]], shapes: Shapes) -> None:
    """A line for each contender."""
    print(f"{sum(map(_numel, shapes)) / 1e6:.1f} M parameters in {len(shapes)} tensors, one step")
    for entry in found:
        for clock in ("cpu", "wall"):
            figures = entry[clock]
            print(f"{clock} {1e3 * figures['minimum']:6.1f} ms", end=" ")
            print(f"({figures['ratio_of_minima']:.2f})", end="  ")
        print(entry["name"])


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


if __name__ == "__main__":
    sys.exit(main())
