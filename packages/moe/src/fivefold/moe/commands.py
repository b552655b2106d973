"""What the verbs of ``fivefold-moe`` do."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fivefold.moe.errors import MoEError
from fivefold.moe.export import export_run
from fivefold.moe.model import MoEForCausalLM
from fivefold.moe.planned import load_planned
from fivefold.moe.train import RunConfig, check, load_run, train_rank
from fivefold.moe.upcycle import UpcycleConfig
from fivefold.moe.upcycle import describe as upcycled
from fivefold.moe.upcycle import upcycle as make_mixture
from fivefold.parallel_core.arguments import check_temperature
from fivefold.parallel_core.hub import resolve
from fivefold.parallel_core.launcher import place, under_torchrun
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.command import TrainCommand
from fivefold.parallel_core.training.run_batches import check_text
from fivefold.parallel_core.training.text_stream import TextStream
from fivefold.parallel_core.training.tokenizer import Tokenizer, load_tokenizer


def train(options: argparse.Namespace) -> int:
    """``fivefold-moe train``."""

    def load(source: Path, overrides: Mapping[str, str]) -> RunConfig:
        if options.plan is None:
            return load_run(source, overrides)
        rank, world_size = place() if under_torchrun() else (0, options.nproc or 1)
        config, chosen = load_planned(source, overrides, world_size, options.machine)
        if rank == 0:
            print(f"the planner's choice for {options.machine}:\n\n{chosen}\n", flush=True)
        return config

    command = TrainCommand(
        load=load,
        check=check,
        describe=describe,
        train_rank=train_rank,
        expected=(MoEError,),
    )
    return command(options)


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


def export(options: argparse.Namespace) -> int:
    """``fivefold-moe export``."""
    output = Path(options.output)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    step = export_run(Path(options.run), output, options.step, dtype, options.max_shard_size)
    print(f"wrote the model after step {step} to {output}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """``fivefold-moe generate``."""
    check_temperature(options.temperature)
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
    text = TextStream(lambda new: tokenizer.decode(new))

    def show(next_b: Tensor) -> None:
        print(text.push(int(next_b[0])), end="", flush=True)

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
