"""Prefill, decoding and a training step on a CPU: ours against transformers' torch path.

python model_cpu.py --json model_cpu.json

Both have the same weights. In each round both do the same work, in an order that changes; the
figure is the smallest CPU time of one thread over the rounds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHForCausalLM

from fivefold.hybrid_ssm import HybridCache, HybridConfig, HybridForCausalLM
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.kernels.bench.machine import describe, versions

MODELS = {
    "25M": {"hidden_size": 512, "num_mamba_heads": 16, "num_attention_heads": 8},
    "63M": {"hidden_size": 1024, "num_mamba_heads": 32, "num_attention_heads": 16},
}
PATTERNS = {"25M": "M-M-M*-M-M-", "63M": "M-M-M*-"}
TARGETS = {"prefill": 1.3, "decode": 1.3, "train": 1.5}

Work = Callable[[], object]


def main() -> int:
    """1 where the two compute something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="25M", help="(%(default)s)")
    parser.add_argument("--case", choices=("prefill", "decode", "train"), action="append")
    parser.add_argument("--length", type=int, default=4096, help="of a prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of decoding (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = models(options.model)
    if not agree(ours, theirs):
        return 1
    records = []
    for case in options.case or ("prefill", "decode", "train"):
        pair, amount = CASES[case](ours, theirs, options)
        seconds = race(pair, options.steps if case == "decode" else options.rounds)
        ratio = seconds[1] / seconds[0]
        record = {"case": case, "model": options.model, **amount, "target": TARGETS[case]}
        record |= {"ours": seconds[0], "transformers": seconds[1], "ratio": ratio}
        records.append(record)
        print(
            f"{case:8} {amount}: ours {seconds[0]:.4f} s, transformers {seconds[1]:.4f} s, "
            f"{ratio:.2f} times (target {TARGETS[case]})",
            flush=True,
        )
    if options.json is not None:
        total = count_parameters(ours.config)[1]
        whole = {"parameters": total, "records": records, **describe("cpu", 1)}
        whole["versions"] = versions(["transformers", "fivefold"])
        options.json.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def models(name: str) -> tuple[HybridForCausalLM, Any]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    sizes = MODELS[name]
    config = HybridConfig(
        vocab_size=4096,
        pattern=PATTERNS[name],
        mamba_head_dim=64,
        state_size=128,
        num_groups=2,
        intermediate_size=4 * sizes["hidden_size"],
        **sizes,
    )
    with TemporaryDirectory() as folder:
        ours = HybridForCausalLM(config)
        ours.save_pretrained(folder)
        theirs = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in theirs.modules():
        if hasattr(module, "A_log"):
            module.time_step_limit = config.dt_limit
    return ours.eval(), theirs.eval()


@torch.no_grad()
def agree(ours: HybridForCausalLM, theirs: Any) -> bool:
    """Whether both give the same logits."""
    ids = tokens(ours, 300)
    error = float((ours(ids) - theirs(ids, use_cache=False).logits).abs().max())
    if error > 1e-4:
        print(f"the logits differ by {error}", file=sys.stderr)
    return error <= 1e-4


def tokens(model: HybridForCausalLM, length: int, batch: int = 1) -> Tensor:
    """Some ids."""
    return torch.randint(0, model.config.vocab_size, (batch, length))


def prefill(
    ours: HybridForCausalLM, theirs: Any, options: argparse.Namespace
) -> tuple[tuple[Work, Work], dict[str, int]]:
    """Reading a prompt: states, keys and the last logits."""
    ids = tokens(ours, options.length)

    @torch.no_grad()
    def mine() -> object:
        return ours(ids, HybridCache(options.length), logits_to_keep=1)

    @torch.no_grad()
    def other() -> object:
        return theirs(ids, use_cache=True, logits_to_keep=1)

    return (mine, other), {"tokens": options.length}


def decode(
    ours: HybridForCausalLM, theirs: Any, options: argparse.Namespace
) -> tuple[tuple[Work, Work], dict[str, int]]:
    """One more token, after a prompt of 64; a round is one token of each."""
    ids, singles = tokens(ours, 64), tokens(ours, options.steps + 1, batch=1).split(1, dim=1)
    turns = {"ours": iter(singles), "theirs": iter(singles)}
    with torch.no_grad():
        cache = HybridCache(64 + len(singles))
        ours(ids, cache)
        kept = theirs(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def mine() -> object:
        return ours(next(turns["ours"]), cache)

    @torch.no_grad()
    def other() -> object:
        return theirs(next(turns["theirs"]), past_key_values=kept, use_cache=True)

    return (mine, other), {"tokens": 1}


def train(
    ours: HybridForCausalLM, theirs: Any, options: argparse.Namespace
) -> tuple[tuple[Work, Work], dict[str, int]]:
    """Forward and backward of a batch."""
    ids = tokens(ours, 513, batch=4)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def mine() -> None:
        ours.train()
        (ours.loss(ours(inputs), targets) / targets.numel()).backward()
        ours.zero_grad()
        ours.eval()

    def other() -> None:
        theirs.train()
        logits = theirs(inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        theirs.zero_grad()
        theirs.eval()

    return (mine, other), {"sequences": 4, "tokens": 512}


CASES = {"prefill": prefill, "decode": decode, "train": train}


def race(pair: tuple[Work, Work], rounds: int) -> tuple[float, float]:
    """The smallest CPU time of each, after one run to warm up."""
    best = [float("inf")] * 2
    for number in range(rounds + 1):
        for index in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            pair[index]()
            if number:
                best[index] = min(best[index], time.process_time() - start)
    return best[0], best[1]


if __name__ == "__main__":
    sys.exit(main())
