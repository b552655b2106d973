"""Whole calls of nn.LSTM and of SparseLSTM on a CPU, in turns; the least time of each counts.

    python cpu.py --json cpu.json

T = 50 steps of 16 inputs. Dense is the better of torch's two ways (oneDNN and its own); "csr" is
the recurrent product alone, a loop over ``torch.sparse`` CSR matrices with int32 indices, without
gates and inputs, which flatters it. "load" is how many processes wanted a CPU in the minute before
the end, this one's threads among them: threads that meet in every step suffer where there are more
of them than CPUs.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from fivefold.kernels.bench.machine import describe
from fivefold.sparse_rnn import SparseLSTM

STEPS, INPUTS = 50, 16
SHAPES = ((1024, 1), (1024, 4), (2304, 1), (2304, 4))


def main() -> None:
    """Measure the shapes that are asked for and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--shapes", nargs="*", default=[f"{h}x{b}" for h, b in SHAPES])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for shape in options.shapes:
        hidden, batch = map(int, shape.split("x"))
        rows += measure(hidden, batch, options.rounds, options.train)
    record = {
        "machine": describe("cpu", options.threads),
        "versions": {name: version(name) for name in ("torch", "fivefold-sparse-rnn")},
        "load": round(os.getloadavg()[0], 1),
        "steps": STEPS,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def measure(hidden: int, batch: int, rounds: int, train: bool) -> list[dict[str, object]]:
    """Times of one shape, a row for each way of running it."""
    dense = nn.LSTM(INPUTS, hidden)
    x = torch.randn(STEPS, batch, INPUTS)
    layers = {
        "10 %": SparseLSTM.from_dense(dense, 0.1),
        "30 %": SparseLSTM.from_dense(dense, 0.3),
        "3 of 32": balanced(dense),
    }
    runs: dict[str, Callable[[], object]] = {
        "dense oneDNN": lambda: with_onednn(True, dense, x, train),
        "dense": lambda: with_onednn(False, dense, x, train),
    }
    for name, layer in layers.items():
        runs[name] = lambda layer=layer: call(layer, x, train)
        if not train:
            weight = to_csr(layer.dense_weight("weight_hh_l0").detach())
            h = torch.randn(hidden, batch)
            runs[f"csr {name}"] = lambda weight=weight, h=h: csr_loop(weight, h)
    best = least(runs, rounds)
    reference = min(best["dense"], best["dense oneDNN"])
    found = []
    for name, seconds in best.items():
        microseconds, ratio = seconds / STEPS * 1e6, reference / seconds
        print(f"H {hidden} B {batch} {name:14} {microseconds:9.1f} us/step  {ratio:5.2f}x")
        found.append(
            {"hidden": hidden, "batch": batch, "train": train, "way": name}
            | {"us_per_step": round(microseconds, 2), "times_dense": round(ratio, 2)}
        )
    return found


def least(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time (s) of each, taken in turns so that a disturbance meets them all."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(1 if name.startswith("dense") else 2):
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def balanced(dense: nn.LSTM) -> SparseLSTM:
    """The three largest of every 32 columns, 9.4 %."""
    weight = dense.weight_hh_l0.detach()
    banks = weight.abs().view(weight.shape[0], -1, 32)
    mask = torch.zeros_like(banks).scatter_(-1, banks.topk(3, -1).indices, 1.0)
    layer = SparseLSTM.from_dense(dense, 0.0)
    layer.set_weight("weight_hh_l0", weight, mask.view_as(weight))
    return layer


def call(layer: nn.Module, x: Tensor, train: bool) -> None:
    """A call, or a call and its gradients."""
    if not train:
        with torch.no_grad():
            layer(x)
        return
    y, _ = layer(x)
    y.sum().backward()
    layer.zero_grad()


def with_onednn(enabled: bool, layer: nn.Module, x: Tensor, train: bool) -> None:
    """A call with or without oneDNN."""
    with torch.backends.mkldnn.flags(enabled=enabled):
        call(layer, x, train)


def to_csr(weight: Tensor) -> Tensor:
    """A matrix in torch's own sparse form with int32 indices, its fastest."""
    csr = weight.to_sparse_csr()
    crow, col = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(crow, col, csr.values(), weight.shape)


def csr_loop(weight: Tensor, h: Tensor) -> None:
    """The recurrent products of all steps."""
    with torch.no_grad():
        for _ in range(STEPS):
            torch.mm(weight, h)


if __name__ == "__main__":
    main()
