"""What the verbs of ``fivefold-hybrid-ssm`` do."""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridError
from fivefold.hybrid_ssm.export import export_run
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.text import TextStream
from fivefold.hybrid_ssm.train import RunConfig, check, load_run, train_rank
from fivefold.parallel_core.commands import FAILED, INTERRUPTED
from fivefold.parallel_core.errors import EXPECTED, ConfigError, LayoutError
from fivefold.parallel_core.hub import resolve
from fivefold.parallel_core.launcher import connect, disconnect, launch, place, under_torchrun
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.loop import Outcome
from fivefold.parallel_core.training.run_batches import check_text
from fivefold.parallel_core.training.tokenizer import load_tokenizer

_KNOWN: tuple[type[Exception], ...] = (*EXPECTED, HybridError)


def train(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm train``."""
    config = load_run(Path(options.config), overrides_of(options.overrides))
    folder = Path(options.run)
    if under_torchrun():
        return _train_under_torchrun(config, folder, options)
    world_size = 1 if options.nproc is None else options.nproc
    try:
        layout = check(config, world_size)
    except LayoutError as error:
        what, *reasons = (line.strip(" -") for line in str(error).splitlines())
        text = f"{what} {'; '.join(reasons)} (world_size is the number of ranks, --nproc)"
        raise LayoutError(text) from None
    describe(config, layout)
    if options.dry_run:
        return 0
    return conclude(train_here(config, folder, world_size, options.tensorboard), folder)


def _train_under_torchrun(config: RunConfig, folder: Path, options: argparse.Namespace) -> int:
    if options.nproc is not None:
        raise ConfigError(
            "--nproc forks ranks, but torchrun has started them already: leave it out"
        )
    rank, world_size = place()
    # Before the ranks meet, which takes seconds: each of them finds the same fault by itself.
    try:
        layout = check(config, world_size)
    except _KNOWN:
        if rank == 0:
            raise
        return FAILED
    connect()
    try:
        if rank == 0:
            describe(config, layout)
        if options.dry_run:
            return 0
        outcome = train_rank(config, folder, options.tensorboard)
    finally:
        disconnect()
    if rank == 0:
        return conclude(outcome, folder)
    # The same status as that of rank 0, or torchrun would say that one of them failed.
    return 0 if outcome.finished else INTERRUPTED


def describe(config: RunConfig, layout: Layout) -> None:
    """Print the layout, the text and the size of the model; tokenises the text if need be."""
    print(layout.explain(), flush=True)
    dataset = config.data.prepare(config.data.load_tokenizer())
    check_text(config.training, dataset)
    print(f"\ntext   {dataset.summary()}")
    total = count_parameters(config.model)[1]
    print(f"model  {config.model.pattern}, {total:,} parameters\n", flush=True)


def train_here(
    config: RunConfig, folder: Path, world_size: int, tensorboard: bool = False
) -> Outcome:
    """Train in ranks forked on this machine.

    Raises:
        RankError: a rank failed; it is named, with its traceback.
    """

    def tell(number: int) -> None:
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step (once more to stop at once)", file=sys.stderr)

    args = (config, folder, tensorboard)
    return launch(train_rank, world_size, *args, on_interrupt=tell)[0]


def conclude(outcome: Outcome, folder: Path) -> int:
    """Say how a run ended; the exit status."""
    if not outcome.finished:
        print(f"stopped after step {outcome.step}; run the same command again to go on")
        return INTERRUPTED
    print(f"finished {outcome.step} steps; metrics, loss curve and checkpoints are in {folder}")
    return 0


def overrides_of(pairs: list[str]) -> dict[str, str]:
    """``["a.b=1"]`` as ``{"a.b": "1"}``; raises ``ConfigError`` for anything else."""
    split = [pair.partition("=") for pair in pairs]
    for (key, equals, _), pair in zip(split, pairs, strict=True):
        if not key or not equals:
            raise ConfigError(f"--set {pair!r}; write KEY=VALUE, e.g. --set training.steps=100")
    return {key: value for key, _, value in split}


def export(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm export``."""
    output = Path(options.output)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    step = export_run(Path(options.run), output, options.step, dtype, options.max_shard_size)
    print(f"wrote the model after step {step} to {output}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm generate``."""
    if options.temperature < 0:
        raise ConfigError(f"--temperature {options.temperature}: it must be at least 0")
    folder = resolve(options.model)
    tokenizer = load_tokenizer(folder)
    with torch.device(options.device or "cpu"):
        model = HybridForCausalLM.from_pretrained(folder, dtype=options.dtype)
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokenizer.encode(options.prompt)).long().unsqueeze(0).to(device)
    clock = _Clock(TextStream(lambda new: tokenizer.decode(new)))
    print(options.prompt, end="", flush=True)
    model.generate(
        ids,
        options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        stop_strings=options.stop,
        tokenizer=tokenizer,
        prefill_chunk_size=options.prefill_chunk_size,
        generator=torch.Generator(device=device).manual_seed(options.seed),
        streamer=clock,
    )
    print()
    print(clock.summary(ids.shape[1]), file=sys.stderr)
    return 0


class _Clock:
    """Prints text as it comes and counts its tokens and seconds."""

    def __init__(self, text: TextStream):
        self.text = text
        self.times = [time.perf_counter()]

    def __call__(self, next_b: Tensor) -> None:
        print(self.text.push(int(next_b[0])), end="", flush=True)
        self.times.append(time.perf_counter())

    def summary(self, num_read: int) -> str:
        """Tokens a second: of the prompt, up to the first new token, and of the others."""
        start, *ends = self.times
        if not ends:
            return f"read {num_read} tokens, wrote none"
        read = f"read {num_read} tokens at {num_read / (ends[0] - start):.1f} tokens/s"
        if len(ends) < 2:
            return f"{read}, wrote 1"
        return f"{read}, wrote {len(ends)} at {(len(ends) - 1) / (ends[-1] - ends[0]):.1f} tokens/s"
