"""What the verbs of ``fivefold-hybrid-ssm`` do."""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.errors import HybridError
from fivefold.hybrid_ssm.export import export_run
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.train import RunConfig, check, load_run, train_rank
from fivefold.parallel_core.arguments import check_temperature
from fivefold.parallel_core.hub import resolve
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.command import TrainCommand
from fivefold.parallel_core.training.run_batches import check_text
from fivefold.parallel_core.training.text_stream import TextStream
from fivefold.parallel_core.training.tokenizer import load_tokenizer


def train(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm train``."""
    command = TrainCommand(
        load=load_run,
        check=check,
        describe=describe,
        train_rank=train_rank,
        expected=(HybridError,),
    )
    return command(options)


def describe(config: RunConfig, layout: Layout) -> None:
    """Print the layout, the text and the size of the model; tokenises the text if need be."""
    print(layout.explain(), flush=True)
    dataset = config.data.prepare(config.data.load_tokenizer())
    check_text(config.training, dataset)
    print(f"\ntext   {dataset.summary()}")
    total = count_parameters(config.model)[1]
    print(f"model  {config.model.pattern}, {total:,} parameters\n", flush=True)


def export(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm export``."""
    output = Path(options.output)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    step = export_run(Path(options.run), output, options.step, dtype, options.max_shard_size)
    print(f"wrote the model after step {step} to {output}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """``fivefold-hybrid-ssm generate``."""
    check_temperature(options.temperature)
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
