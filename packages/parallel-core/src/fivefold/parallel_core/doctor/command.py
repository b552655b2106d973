"""What ``fivefold-parallel-core doctor`` does: in ranks of its own, or in torchrun's."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import lcm
from typing import Any

import torch

from fivefold.parallel_core.commands import FAILED, run_command
from fivefold.parallel_core.doctor.examination import Options, examine, warm_up
from fivefold.parallel_core.doctor.report import Report
from fivefold.parallel_core.doctor.rounds import Rounds
from fivefold.parallel_core.errors import EXPECTED, ConfigError, LayoutError, RankError
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.launcher import connect, disconnect, launch, under_torchrun
from fivefold.parallel_core.layout import Layout

_WRONG_USE = 2
_DEGREES = ("tp", "cp", "pp", "ep", "etp")
# Beyond the time of a check, so that it is the doctor who finds what hangs and not the backend,
# whose watchdog may end the process.
_MARGIN = 60.0


def doctor(name: str, given: argparse.Namespace) -> int:
    """Examine the collectives of a layout.

    Args:
        name: of the program, for messages.
        given: the command line.

    Returns:
        The exit status: 0 where all went well, 2 where the layout is illegal.

    Raises:
        RankError: something did not go well; the message names it.
        ConfigError: the command line asks for what cannot be.
    """
    options = Options(nbytes=given.bytes, repeats=given.repeats, timeout=given.timeout)
    if under_torchrun():
        return _in_torchrun(name, given, options)
    if given.device == "cuda":
        raise ConfigError(
            "--device cuda needs torchrun, one process for each GPU: torchrun --nproc-per-node N"
            " -m fivefold.parallel_core doctor; the ranks that doctor forks itself are on the CPU"
        )
    return _refusing(name, partial(_in_forked_ranks, given, options))


def _refusing(name: str, work: Callable[[], int]) -> int:
    """Do ``work``; a layout that cannot be gives its own explanation and the status of misuse."""
    try:
        return work()
    except LayoutError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return _WRONG_USE


def _in_forked_ranks(given: argparse.Namespace, options: Options) -> int:
    layout = _layout(given, _fitting(given) if given.nproc is None else given.nproc)
    print(layout.explain(layout.world_size), flush=True)
    warm_up()  # once, and not in every rank
    args = (layout, options, given.json)
    timeout = options.timeout + _MARGIN
    reports = launch(_be_forked, layout.world_size, *args, collective_timeout=timeout)
    return _conclude(reports[0])


def _fitting(given: argparse.Namespace) -> int:
    """The smallest world that takes the degrees asked for, of two ranks at least."""
    size = lcm(given.tp * given.cp * given.pp, given.etp * given.ep * given.pp)
    return max(2, size)


def _layout(given: argparse.Namespace, world_size: int) -> Layout:
    degrees: dict[str, Any] = {axis: getattr(given, axis) for axis in _DEGREES}
    return Layout(world_size, **degrees, order=given.order)


def _be_forked(layout: Layout, options: Options, file: str | None) -> Report:
    device = torch.device("cpu")
    return _examine(layout, options, device, Rounds(options.timeout, device), file)


def _examine(
    layout: Layout, options: Options, device: torch.device, rounds: Rounds, file: str | None
) -> Report:
    """Be one rank of an examination; rank 0 tells and writes.

    Raises:
        RankError: a rank gives no answer; the launcher then ends it with the others.
    """
    report = examine(layout, options, device, rounds, partial(print, flush=True))
    if rounds.rank == 0 and file is not None:
        write_json(file, report.to_dict())
    if report.silent:
        raise RankError(report.summary())
    return report


def _conclude(report: Report) -> int:
    if not report.is_ok:
        raise RankError(report.summary())
    print(report.summary(), flush=True)
    return 0


def _in_torchrun(name: str, given: argparse.Namespace, options: Options) -> int:
    if given.nproc is not None:
        raise ConfigError(
            "--nproc forks ranks, but torchrun has started them already: leave it out"
        )
    device, rounds = _join(given.device, options)
    status = FAILED
    work = partial(_in_one_rank, given, options, device, rounds)
    if rounds.rank == 0:
        status = run_command(name, partial(_refusing, name, work), debug=given.debug)
    else:
        with suppress(*EXPECTED):  # rank 0 says it
            work()
    status = rounds.farewell(status)
    if status:
        # A thread that hangs in a collective would keep the interpreter and the group from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    disconnect()
    return status


def _join(device_type: str | None, options: Options) -> tuple[torch.device, Rounds]:
    """Meet the other ranks that torchrun started."""
    warm_up()
    try:
        connect(device_type=device_type, timeout=options.timeout + _MARGIN)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankError(f"the ranks that torchrun started do not meet: {reason}") from error
    device = torch.device("cpu")
    if device_type != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device, Rounds(options.timeout, device)


def _in_one_rank(
    given: argparse.Namespace, options: Options, device: torch.device, rounds: Rounds
) -> int:
    layout = _layout(given, rounds.world_size)
    if rounds.rank == 0:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", rounds.world_size))
        print(layout.explain(per_node), flush=True)
    report = _examine(layout, options, device, rounds, given.json)
    return _conclude(report) if rounds.rank == 0 else 0
