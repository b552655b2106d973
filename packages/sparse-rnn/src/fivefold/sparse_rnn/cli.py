"""The command ``fivefold-sparse-rnn``; torch is imported only once there is something to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fivefold.parallel_core.commands import run_command
from fivefold.sparse_rnn.errors import SparseRNNError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 where all went well, 1 where it failed, 2 where the command line was wrong, 130 where
        it was interrupted.
    """
    options = _parser().parse_args(arguments)
    return run_command(
        "fivefold-sparse-rnn",
        lambda: _run(options),
        expected=(SparseRNNError,),
        debug=options.debug,
    )


def _run(options: argparse.Namespace) -> int:
    from fivefold.sparse_rnn import commands

    run = {
        "prune": commands.prune,
        "export": commands.export,
        "bench": commands.bench,
        "plan": commands.plan,
    }
    return run[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivefold-sparse-rnn",
        description="Prune recurrent layers, make them sparse, and see how fast they are.",
    )
    name = "fivefold-sparse-rnn"
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(name)}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prune(commands.add_parser("prune", help="put zeros into the recurrent weights of a file"))
    _add_export(commands.add_parser("export", help="write the layers of a file as sparse ones"))
    _add_bench(commands.add_parser("bench", help="time a sparse layer beside torch's dense one"))
    _add_plan(commands.add_parser("plan", help="tell whether and how a layer fits on a GPU"))
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read a state dict (.safetensors, .pt), zero the smallest recurrent weights (weight_hh_l*) "
        "of every layer in it, and write it in torch's spelling. Train on from there, or use "
        "fivefold.sparse_rnn.prune.GradualPruner in training, which loses less."
    )
    parser.add_argument("source", metavar="FILE", help="state dict with weight_hh_l*")
    parser.add_argument("output", metavar="OUTPUT", help=".safetensors file to write")
    parser.add_argument("--density", type=float, required=True, metavar="D", help="share to keep")
    parser.add_argument(
        "--pattern",
        choices=("unstructured", "balanced", "blocks", "2:4"),
        default="unstructured",
        help="which values may be kept together (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "matrix"),
        default="matrix",
        help="what shares the density (default: %(default)s)",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write each recurrent layer of a state dict whose weights are mostly zeros, or masked by "
        "torch.nn.utils.prune, as a folder that SparseLSTM.from_pretrained loads."
    )
    parser.add_argument("source", metavar="FILE", help="state dict with weight_hh_l*")
    parser.add_argument("output", metavar="FOLDER", help="a folder for each layer is made in it")
    parser.add_argument(
        "--cell",
        choices=("LSTM", "GRU", "RNN_TANH", "RNN_RELU"),
        help="of the layers (default: told by the number of gates, where it is 4 or 3)",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Whole calls of torch's layer and of ours in turns on this machine's CPU; the least time "
        "of each counts."
    )
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--hidden", type=int, default=1024, help="units (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="forward and backward")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Whether a recurrent layer's nonzeros fit on the multiprocessors of a GPU, which need not "
        "be here; where they lie, and how long a step takes by arithmetic."
    )
    cells = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
    parser.add_argument("--cell", choices=cells, default="LSTM")
    parser.add_argument("--hidden", type=int, default=1024, help="units (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument(
        "--values",
        choices=("float16", "bfloat16", "float32"),
        default="float32",
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="h100",
        help="a100, h100, h200, b200, or here (default: %(default)s)",
    )
    parser.add_argument("--backward", action="store_true", help="the kernel of the gradients")


if __name__ == "__main__":
    sys.exit(main())
