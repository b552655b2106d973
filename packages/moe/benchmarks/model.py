"""Forward and backward of whole models beside transformers', on this machine's CPU.

    python packages/moe/benchmarks/model.py --output packages/moe/benchmarks/model_cpu.json

Both models have the same weights and get the same 2048 tokens, other ones in every round, as in
training: experts then get other numbers of rows. Calls alternate, in one process, so that whatever
else the machine does meets both; the ratio is that of the medians. Peak memory is what three such
steps add to a process of their own that has loaded the model: held where malloc gives back at once
what is freed, so that it is what the steps need; resident where it does as it always does and keeps
holes between blocks of other sizes.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fivefold.moe import MoEConfig, MoEForCausalLM
from fivefold.moe.router_config import RouterConfig

SHAPE = {"vocab_size": 4096, "hidden_size": 512, "num_layers": 4, "num_attention_heads": 8}
MODELS = {
    "mixtral": MoEConfig(
        **SHAPE,
        num_key_value_heads=2,
        expert_intermediate_size=1024,
        num_experts=8,
        num_experts_per_token=2,
        router=RouterConfig(aux_loss_coef=0.0),
    ),
    "qwen2_moe": MoEConfig(
        **SHAPE,
        model_type="qwen2_moe",
        qkv_bias=True,
        expert_intermediate_size=256,
        num_experts=32,
        num_experts_per_token=4,
        shared_intermediate_size=1024,
        shared_gate=True,
        router=RouterConfig(normalize=False, aux_loss_coef=0.0),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Not its "batched_mm", which copies an expert's matrices for every token: 17 GB in a layer here.
BACKENDS = ("eager", "grouped_mm")
SEQUENCES, LENGTH = 4, 512


def load(folder: str, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Our model, or transformers' with one of its ways to run experts."""
    if name == "fivefold":
        return MoEForCausalLM.from_pretrained(folder, dtype=dtype).train()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=name
    ).train()


def step(model: torch.nn.Module, ids: Tensor) -> None:
    """Logits, the token loss and all gradients."""
    # As transformers' own loss has it: logits stay whole, and the last has no target.
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    out = model(ids)
    if isinstance(model, MoEForCausalLM):
        loss = model.loss(out, targets) / ids[:, 1:].numel()
    else:
        logits = out.logits.flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    loss.backward()
    model.zero_grad()


def seconds(call: Callable[[], None]) -> float:
    """CPU time of one call over all threads, which other processes change little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(
    folder: str, dtype: torch.dtype, rounds: int, backends: Sequence[str]
) -> dict[str, float]:
    """The median of alternating calls of every model, in seconds."""
    models = {name: load(folder, name, dtype) for name in ("fivefold", *backends)}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        ids = tokens()
        for name, model in models.items():
            took = seconds(partial(step, model, ids))
            if number:  # the first round warms up
                spent[name].append(took)
    return {name: median(times) for name, times in spent.items()}


def tokens() -> Tensor:
    """Random ids of all sequences."""
    return torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH))


def peak(folder: str, name: str, dtype: str, *, held: bool) -> int:
    """Bytes that forwards and backwards add to a process that has the model."""
    words = [sys.executable, __file__, "--peak", name, "--folder", folder, "--dtype", dtype]
    words += ["--held"] * held
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_peak(folder: str, name: str, dtype: torch.dtype) -> int:
    """The same, in this process."""
    model = load(folder, name, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    for _ in range(3):
        step(model, tokens())
    return status("VmHWM") - before


def give_back_at_once() -> None:
    """Let every freed block of 64 KiB and more leave the process."""
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h; once set, glibc no longer moves it
    if ctypes.CDLL(None).mallopt(threshold, 64 << 10) != 1:
        raise OSError("this system's malloc cannot be told to give back freed memory at once")


def status(key: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.peak:
        if options.held:
            give_back_at_once()
        print(measure_peak(options.folder, options.peak, DTYPES[options.dtype]))
        return
    records = []
    for kind in options.models:
        with tempfile.TemporaryDirectory() as folder:
            MoEForCausalLM(MODELS[kind]).save_pretrained(folder)
            for dtype in options.dtypes:
                records.append(record(kind, folder, dtype, options.rounds, options.backends))
                print(json.dumps(records[-1]), flush=True)
    if options.output:
        described = {"machine": machine(options.threads), "records": records}
        options.output.write_text(json.dumps(described, indent=1) + "\n")


def record(
    kind: str, folder: str, dtype: str, rounds: int, backends: Sequence[str]
) -> dict[str, Any]:
    """One model in one dtype."""
    times = compare(folder, DTYPES[dtype], rounds, backends)
    fastest = min(backends, key=times.__getitem__)
    peaks = {
        kind: {
            name: peak(folder, name, dtype, held=kind == "held") for name in ("fivefold", fastest)
        }
        for kind in ("held", "resident")
    }
    return {
        "model": kind,
        "dtype": dtype,
        "tokens": SEQUENCES * LENGTH,
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "fastest_of_transformers": fastest,
        "times_faster": round(times[fastest] / times["fivefold"], 3),
        "peak_bytes": peaks,
        "peak_ratio": {
            kind: round(each["fivefold"] / each[fastest], 3) for kind, each in peaks.items()
        },
    }


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    names = ("torch", "transformers", "fivefold-moe", "fivefold-kernels")
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
