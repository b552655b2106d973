"""What the verbs of ``fivefold-moe`` do."""

import argparse
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from fivefold.moe.errors import MoEError
from fivefold.moe.export import export_run
from fivefold.moe.model import MoEForCausalLM
from fivefold.moe.train import RunConfig, check, load_run, train_rank
from fivefold.moe.upcycle import UpcycleConfig
from fivefold.moe.upcycle import describe as upcycled
from fivefold.moe.upcycle import upcycle as make_mixture
from fivefold.parallel_core.commands import FAILED, INTERRUPTED
from fivefold.parallel_core.errors import EXPECTED, ConfigError, LayoutError
from fivefold.parallel_core.hub import resolve
from fivefold.parallel_core.launcher import connect, disconnect, launch, place, under_torchrun
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.loop import Outcome
from fivefold.parallel_core.training.run_batches import check_text
from fivefold.parallel_core.training.tokenizer import Tokenizer, load_tokenizer

_KNOWN: tuple[type[Exception], ...] = (*EXPECTED, MoEError)


def train(options: argparse.Namespace) -> int:
    """``fivefold-moe train``."""
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
    with torch.device("meta"):
        model = MoEForCausalLM(config.model)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.model.num_experts - config.model.num_experts_per_token)
    active = total - idle // config.model.num_experts
    print(f"model  {total:,} parameters, {active:,} of them active for a token\n", flush=True)


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
    """``fivefold-moe export``."""
    output = Path(options.output)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    step = export_run(Path(options.run), output, options.step, dtype, options.max_shard_size)
    print(f"wrote the model after step {step} to {output}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """``fivefold-moe generate``."""
    if options.temperature < 0:
        raise ConfigError(f"--temperature {options.temperature}: it must be at least 0")
    folder = resolve(options.model)
    tokenizer = load_tokenizer(folder)
    model = MoEForCausalLM.from_pretrained(folder)
    stream_text(
        model,
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return 0


def upcycle(options: argparse.Namespace) -> int:
    """``fivefold-moe upcycle``."""
    config = UpcycleConfig(
        copies=options.copies,
        copies_per_token=options.copies_per_token,
        granularity=options.granularity,
        seed=options.seed,
    )
    mixture = make_mixture(options.model, options.output, config)
    print(f"wrote a {upcycled(mixture)} to {options.output}")
    return 0


def stream_text(
    model: MoEForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Print a prompt and its continuation as it comes; temperature 0 takes the likeliest."""
    ids = torch.from_numpy(tokenizer.encode(prompt)).long().unsqueeze(0)
    new: list[int] = []
    shown = ""

    def show(next_b: Tensor) -> None:
        nonlocal shown
        new.append(int(next_b[0]))
        text = tokenizer.decode(new)
        # A character may take several tokens; what is not whole yet waits for the next one.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    print(prompt, end="", flush=True)
    model.generate(
        ids,
        max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
        streamer=show,
    )
    print()
