"""What a training run of any model is told: steps, optimizer, precision, checkpoints."""

from dataclasses import dataclass, field

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.retention import Retention
from fivefold.parallel_core.training.optimizer import AdamWConfig
from fivefold.parallel_core.training.schedule import WarmupCosine


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Config):
    """A training run, whatever it trains.

    Attributes:
        steps: optimizer steps in all.
        global_batch_size: samples in a step, over all ranks.
        seed: of the initial weights and of the order of the data.
        gradient_clip: largest global norm of the gradient; None for no limit.
        skip_nonfinite: how many steps in a row may have a gradient that is not finite: such a step
            changes nothing and is counted; one more stops the run.
        evaluate_every: steps between evaluations on held-out data, besides the one at the end;
            None for only that one.
        checkpoint_every: steps between checkpoints, besides the one at the end.
        keep_checkpoints: newest checkpoints that are kept.
        keep_checkpoints_every: checkpoints after a multiple of so many steps are kept as well.
        keep_best_checkpoints: how many with the lowest held-out loss are kept as well.
        checkpoint_in_background: let training go on while a checkpoint is written; it holds the
            values of its step. Takes memory of the host for one copy of what a rank holds.
        optimizer: constants of AdamW.
        schedule: learning rate.
        precision: dtypes.
        data_parallel: what is sharded over the ranks that see other data.
        recompute: what backward recomputes instead of keeping it: "none", "selective", "full", or
            regions of the model joined by "+".
    """

    steps: int
    global_batch_size: int
    seed: int = 0
    gradient_clip: float | None = 1.0
    skip_nonfinite: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_checkpoints_every: int | None = None
    keep_best_checkpoints: int = 0
    checkpoint_in_background: bool = False
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: WarmupCosine
    precision: Precision = field(default_factory=Precision)
    data_parallel: DataParallelConfig = field(default_factory=DataParallelConfig)
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size"):
            at_least_one(name, getattr(self, name))
        for name in ("checkpoint_every", "keep_checkpoints", "keep_checkpoints_every"):
            at_least_one(name, getattr(self, name))
        at_least_one("evaluate_every", self.evaluate_every)
        for name in ("skip_nonfinite", "keep_best_checkpoints"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 0")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(
                f"gradient_clip={self.gradient_clip}; a positive norm, or leave it out for none"
            )

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        return Retention(
            last=self.keep_checkpoints,
            every=self.keep_checkpoints_every,
            best=self.keep_best_checkpoints,
        )


def at_least_one(name: str, value: int | None) -> None:
    """Raise ``ConfigError`` where a count that is given is below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name}={value}; it must be at least 1")
