"""Decoding after long texts: a hybrid and an attention-only twin with as many parameters.

python long_context.py --json long_context.json --plot long_context.png

At each length both go on from a cache of so many tokens and decode some more; the figure is the
smallest CPU time of one token with one thread. What the caches hold is random: neither time nor
memory depends on it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fivefold.hybrid_ssm import HybridCache, HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.kernels.bench.machine import describe, versions

LENGTHS = (1024, 4096, 16384, 65536)
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
MODELS = {
    "hybrid": HybridConfig(
        pattern="M-M-M*-M-M-M-",
        num_mamba_heads=8,
        mamba_head_dim=64,
        state_size=64,
        num_groups=2,
        intermediate_size=1024,
        **COMMON,
    ),
    "attention": HybridConfig(pattern="*-" * 7, intermediate_size=1382, **COMMON),
}


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="tokens at each length (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = [
        measure(name, HybridForCausalLM(config).eval(), length, options.steps)
        for name, config in MODELS.items()
        for length in LENGTHS
    ]
    if options.json is not None:
        sizes = {name: count_parameters(config)[1] for name, config in MODELS.items()}
        whole = {"parameters": sizes, "records": records, **describe("cpu", 1)}
        options.json.write_text(json.dumps(whole | {"versions": versions(["fivefold"])}, indent=2))
    if options.plot is not None:
        draw(records, options.plot)
    return 0


@torch.no_grad()
def measure(name: str, model: HybridForCausalLM, length: int, steps: int) -> dict[str, Any]:
    """Time of one token after ``length``, and memory of the cache."""
    cache = HybridCache(length + steps + 1)
    model(torch.zeros(1, 2, dtype=torch.long), cache)
    for kept in cache.attention.values():
        for tensor in (kept.keys, kept.values):
            if tensor is not None:
                tensor.normal_()
    cache.length = length
    token, best = torch.zeros(1, 1, dtype=torch.long), float("inf")
    for _ in range(steps):
        start = time.process_time()
        model(token, cache)
        best = min(best, time.process_time() - start)
    size = cache.num_bytes()
    record = {
        "model": name,
        "length": length,
        "milliseconds": best * 1e3,
        "states_bytes": size.states,
        "keys_values_bytes": size.keys_values,
    }
    total = (size.states + size.keys_values) / 2**20
    print(f"{name:9} {length:6}: {best * 1e3:7.3f} ms a token, {total:7.2f} MiB", flush=True)
    return record


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Both figures against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for name in MODELS:
        mine = [record for record in records if record["model"] == name]
        lengths = [record["length"] for record in mine]
        axes[0].plot(lengths, [record["milliseconds"] for record in mine], marker="o", label=name)
        memory = [(r["states_bytes"] + r["keys_values_bytes"]) / 2**20 for r in mine]
        axes[1].plot(lengths, memory, marker="o", label=name)
    for axis, title in zip(axes, ("milliseconds a token", "MiB of cache"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens before", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
