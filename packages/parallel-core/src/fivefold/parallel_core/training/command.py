"""What ``train`` does in every package: ranks forked here, or those of torchrun."""

import argparse
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fivefold.parallel_core.arguments import overrides_of
from fivefold.parallel_core.commands import FAILED, INTERRUPTED
from fivefold.parallel_core.errors import EXPECTED, ConfigError, LayoutError
from fivefold.parallel_core.launcher import connect, disconnect, launch, place, under_torchrun
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.ends import Outcome

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand(Generic[C]):
    """The verb ``train`` of a package; called with the options of ``arguments.add_train``.

    Attributes:
        load: a file and overrides to the configuration of a run.
        check: checks it for a number of ranks, and gives their layout.
        describe: prints what is going to be trained, once; may prepare the data.
        train_rank: trains on one rank: configuration, folder of the run, TensorBoard or not.
        expected: errors besides ``EXPECTED`` that a user can make.
    """

    load: Callable[[Path, Mapping[str, str]], C]
    check: Callable[[C, int], Layout]
    describe: Callable[[C, Layout], None]
    train_rank: Callable[[C, Path, bool], Outcome]
    expected: tuple[type[Exception], ...] = ()

    def __call__(self, options: argparse.Namespace) -> int:
        """Train; the exit status.

        Raises:
            ConfigError, LayoutError: what was asked for cannot be; nothing has been started.
            RankError: a rank failed; it is named, with its traceback.
        """
        config = self.load(Path(options.config), overrides_of(options.overrides))
        folder = Path(options.run)
        if under_torchrun():
            return self._under_torchrun(config, folder, options)
        world_size = 1 if options.nproc is None else options.nproc
        self.describe(config, self._layout(config, world_size))
        if options.dry_run:
            return 0
        outcome = train_here(self.train_rank, world_size, config, folder, options.tensorboard)
        return conclude(outcome, folder)

    def _layout(self, config: C, world_size: int) -> Layout:
        """The layout; an illegal one in one line."""
        try:
            return self.check(config, world_size)
        except LayoutError as error:
            what, *reasons = (line.strip(" -") for line in str(error).splitlines())
            text = f"{what} {'; '.join(reasons)} (world_size is the number of ranks, --nproc)"
            raise LayoutError(text) from None

    def _under_torchrun(self, config: C, folder: Path, options: argparse.Namespace) -> int:
        if options.nproc is not None:
            raise ConfigError(
                "--nproc forks ranks, but torchrun has started them already: leave it out"
            )
        rank, world_size = place()
        # Before the ranks meet, which takes seconds: each of them finds the same fault by itself.
        try:
            layout = self.check(config, world_size)
        except (*EXPECTED, *self.expected):
            if rank == 0:
                raise
            return FAILED
        connect()
        try:
            if rank == 0:
                self.describe(config, layout)
            if options.dry_run:
                return 0
            outcome = self.train_rank(config, folder, options.tensorboard)
        finally:
            disconnect()
        if rank == 0:
            return conclude(outcome, folder)
        # The same status as that of rank 0, or torchrun would say that one of them failed.
        return 0 if outcome.finished else INTERRUPTED


def train_here(
    train_rank: Callable[[C, Path, bool], Outcome],
    world_size: int,
    config: C,
    folder: Path,
    tensorboard: bool = False,
) -> Outcome:
    """Train in ranks forked on this machine.

    Args:
        train_rank: as in ``TrainCommand``.
        world_size: number of ranks.
        config: the run.
        folder: of the run.
        tensorboard: write TensorBoard events too.

    Raises:
        RankError: a rank failed; it is named, with its traceback.
    """

    def tell(number: int) -> None:
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step (once more to stop at once)", file=sys.stderr)

    return launch(train_rank, world_size, config, folder, tensorboard, on_interrupt=tell)[0]


def conclude(outcome: Outcome, folder: Path) -> int:
    """Say how a run ended; the exit status."""
    if not outcome.finished:
        print(f"stopped after step {outcome.step}; run the same command again to go on")
        return INTERRUPTED
    print(f"finished {outcome.step} steps; metrics, loss curve and checkpoints are in {folder}")
    return 0
