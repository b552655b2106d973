"""The main job end to end: train a folded MoE model on real text, hand back a checkpoint.

``python -m fivefold.integration.demo`` trains on Python's own source with 8 forked ranks, exports
the model, loads it with transformers and compares the two, and continues a text with it. Stop it
with Ctrl-C and run it again: it goes on where it was.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from fivefold.integration.compare import largest_logit_difference
from fivefold.moe.commands import describe, stream_text
from fivefold.moe.errors import MoEError
from fivefold.moe.export import export_run
from fivefold.moe.model import MoEForCausalLM
from fivefold.moe.train import RunConfig, check, load_run, train_rank
from fivefold.parallel_core.arguments import add_overrides, overrides_of
from fivefold.parallel_core.commands import run_command
from fivefold.parallel_core.config import load_toml
from fivefold.parallel_core.training.command import conclude, train_here

TOLERANCE = 1e-4
"""Largest difference of float32 logits between fivefold and transformers that passes."""

PROMPT = "class Reader:\n    def __init__(self, "


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command("demo", lambda: _run(options), expected=(MoEError,), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    source = Path(str(files("fivefold.integration"))) / "demo.toml"
    config = load_run(load_toml(source), overrides_of(options.overrides))
    layout = check(config, options.nproc)
    describe(config, layout)
    folder = Path(options.run)
    outcome = train_here(train_rank, options.nproc, config, folder)
    status = conclude(outcome, folder)
    if status != 0:
        return status
    if outcome.heldout_loss is not None:
        bits = outcome.heldout_loss / math.log(2)
        print(f"\nheld-out text, which training never saw: {bits:.3f} bits a token (byte)")
    return show(config, folder, folder / "model")


def show(config: RunConfig, run: Path, model_folder: Path) -> int:
    """Export a run's model, compare it with transformers and print a sample; the exit status."""
    step = export_run(run, model_folder)
    print(f"exported the model after step {step} to {model_folder} (Hugging Face Mixtral)")
    model = MoEForCausalLM.from_pretrained(model_folder)
    tokenizer = config.data.load_tokenizer()
    text = Path(__file__).read_text()
    ids = torch.from_numpy(tokenizer.encode(text)).long()[: config.training.sequence_length]
    difference = largest_logit_difference(model, model_folder, ids.unsqueeze(0))
    passed = difference <= TOLERANCE
    verdict = "passes" if passed else "FAILS"
    print(f"largest logit difference to transformers: {difference:.2e} ({verdict} {TOLERANCE:g})")
    print("\nsample, the first line and a half given:\n")
    stream_text(model, tokenizer, PROMPT, 300, temperature=0.6, top_k=20)
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--run", default="runs/demo", metavar="FOLDER", help="folder of the run")
    parser.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks to fork")
    add_overrides(parser, "demo.toml")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
