"""What the commands do."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.parallel_core.files import atomic_file
from fivefold.sparse_rnn import SparseGRU, SparseLSTM, SparseRNN
from fivefold.sparse_rnn import plan as planning
from fivefold.sparse_rnn.dense import NUM_GATES, find_weight
from fivefold.sparse_rnn.errors import SparseRNNFileError, SparseRNNInputError
from fivefold.sparse_rnn.prune.patterns import Balanced, Blocks, NofM, Pattern, Unstructured
from fivefold.sparse_rnn.recurrent import SparseRecurrent

_PATTERNS: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "balanced": Balanced(),
    "blocks": Blocks(),
    "2:4": NofM(),
}


def prune(options: argparse.Namespace) -> int:
    """Zero the smallest recurrent weights of a state dict."""
    state = _load(options.source)
    names = _recurrent(state, options.source)
    weights = {name: found.values for name in names if (found := find_weight(state, name))}
    scores = [weight.abs().float() for weight in weights.values()]
    pattern = _PATTERNS[options.pattern]
    groups = [scores] if options.scope == "global" else [[score] for score in scores]
    masks = [mask for group in groups for mask in pattern.select(group, options.density)]
    for (name, weight), mask in zip(weights.items(), masks, strict=True):
        state.pop(f"{name}_orig", None)
        state.pop(f"{name}_mask", None)
        state[name] = weight * mask
        print(f"{name}: kept {float(mask.float().mean()):.1%} of {weight.numel()}")
    _save(state, Path(options.output))
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the recurrent layers of a state dict as sparse ones."""
    state = _load(options.source)
    names = _recurrent(state, options.source)
    for prefix in sorted({name.rpartition(".")[0] for name in names}):
        start = f"{prefix}." if prefix else ""
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        layer = _layer({k: v for k, v in own.items() if "." not in k}, options.cell)
        folder = Path(options.output) / (prefix or "layer")
        layer.save_pretrained(folder)
        print(f"{folder}: {layer}")
    return 0


def bench(options: argparse.Namespace) -> int:
    """Time a sparse layer beside torch's."""
    if options.threads:
        torch.set_num_threads(options.threads)
    classes = {
        "LSTM": (nn.LSTM, SparseLSTM),
        "GRU": (nn.GRU, SparseGRU),
        "RNN": (nn.RNN, SparseRNN),
    }
    dense_class, sparse_class = classes[options.cell]
    dense = dense_class(options.hidden, options.hidden)
    sparse = sparse_class.from_dense(dense, options.density)
    x = torch.randn(options.steps, options.batch, options.hidden)
    runs = {"torch": lambda: _call(dense, x, options.train)}
    runs["sparse"] = lambda: _call(sparse, x, options.train)
    best = _least(runs, options.rounds)
    for name, seconds in best.items():
        print(f"{name:8} {seconds / options.steps * 1e6:10.1f} us a step")
    print(f"{best['torch'] / best['sparse']:.2f} times as fast, {torch.get_num_threads()} threads")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Tell whether and how a layer fits on a GPU."""
    found = planning.plan(
        options.cell.lower(),
        options.hidden,
        density=options.density,
        batch=options.batch,
        values=options.values,
        device=planning.Device.here() if options.device == "here" else options.device,
        backward=options.backward,
    )
    print(found)
    return 0


def _least(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The shortest time (s) of each, taken in turns so that a disturbance meets them all."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(max(rounds, 1)):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _call(layer: nn.Module, x: Tensor, train: bool) -> None:
    with torch.set_grad_enabled(train):
        y, _ = layer(x)
        if train:
            y.sum().backward()
            layer.zero_grad()


def _layer(state: dict[str, Tensor], cell: str | None) -> SparseRecurrent:
    """A sparse layer with the weights of a state dict; its sizes are those of the weights."""
    first, recurrent = find_weight(state, "weight_ih_l0"), find_weight(state, "weight_hh_l0")
    if first is None or recurrent is None:
        raise SparseRNNFileError("a layer needs weight_ih_l0 and weight_hh_l0")
    rows, hidden = recurrent.values.shape
    mode = cell or {4: "LSTM", 3: "GRU"}.get(rows // hidden)
    if mode is None or NUM_GATES[mode] * hidden != rows:
        raise SparseRNNInputError(
            f"weight_hh_l0 of shape {(rows, hidden)} is not that of a {mode or 'LSTM or GRU'}; "
            "name the right --cell"
        )
    options: dict[str, Any] = {
        "num_layers": sum(k.startswith("bias_ih_l") and "rev" not in k for k in state)
        or sum(
            k.removesuffix("_orig")[11:].isdigit() for k in state if k.startswith("weight_ih_l")
        ),
        "bias": "bias_ih_l0" in state,
        "bidirectional": any("l0_reverse" in k for k in state),
        "density": 0.0,
        "dtype": recurrent.values.dtype,
    }
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode.removeprefix("RNN_").lower()
    classes = {"LSTM": SparseLSTM, "GRU": SparseGRU}
    make: Any = classes.get(mode, SparseRNN)
    layer: SparseRecurrent = make(first.values.shape[1], hidden, **options)
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        raise SparseRNNFileError(str(error)) from None
    return layer


def _recurrent(state: dict[str, Tensor], source: str) -> list[str]:
    """Names of the recurrent matrices, without what prune adds to them."""
    names = {k.removesuffix("_orig").removesuffix("_mask") for k in state}
    found = sorted(name for name in names if name.rpartition(".")[2].startswith("weight_hh_l"))
    if not found:
        raise SparseRNNFileError(
            f"{source} holds no weight_hh_l*, as recurrent layers of torch have"
        )
    return found


def _load(source: str) -> dict[str, Tensor]:
    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(source)
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SparseRNNFileError(f"cannot read {source}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise SparseRNNFileError(f"{source} is not a state dict: names and tensors")
    return found


def _save(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save({name: x.contiguous() for name, x in state.items()}))
