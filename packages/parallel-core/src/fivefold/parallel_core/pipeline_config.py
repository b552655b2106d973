"""Which pipeline schedules there are, what each needs, and which stages a rank has."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError

Schedule = Literal[
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
ONE_STAGE = ("GPipe", "1F1B")
"""Schedules with one stage on each rank; the others have several."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules whose second half runs back over the ranks, so that rank 0 has both ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig(Config):
    """How the layers lie over the pipeline ranks, and in which order microbatches run.

    Attributes:
        schedule: "GPipe" (arXiv 1811.06965), "1F1B" (PipeDream-Flush, 2006.09503), "LoopedBFS"
            (2211.05953), "Interleaved1F1B" (2104.04473), "InterleavedZeroBubble" and
            "ZBVZeroBubble" (2401.10241), "DualPipeV" (2412.19437).
        stages_per_rank: number of stages on each rank: 1 for "GPipe" and "1F1B", 2 for the V-shaped
            "ZBVZeroBubble" and "DualPipeV", 2 or more for the others.
        activation_budget: bytes of activations that autograd may keep on each rank between forward
            and backward. As many microbatches as fit are stored as they are, and the layers of the
            others are recomputed (arXiv 2205.05198, appendix C); None stores all.
    """

    schedule: Schedule = "1F1B"
    stages_per_rank: int = 1
    activation_budget: int | None = None

    def __post_init__(self) -> None:
        least = 1 if self.schedule in ONE_STAGE else 2
        exact = self.schedule in (*ONE_STAGE, *V_SHAPED)
        if self.stages_per_rank < least or (exact and self.stages_per_rank > least):
            legal = f"{least}" if exact else f"{least} or more"
            raise ConfigError(
                f"schedule {self.schedule!r} with stages_per_rank={self.stages_per_rank}; it has "
                f"{legal} on each rank"
            )
        if self.activation_budget is not None and self.activation_budget < 1:
            raise ConfigError(
                f"activation_budget={self.activation_budget}; it is a number of bytes above 0, or "
                "none"
            )

    def stage_index(self, rank: int, part: int, num_ranks: int) -> int:
        """Index of the stage that is the ``part``-th of a pipeline rank."""
        if self.schedule in V_SHAPED and part == 1:
            return 2 * num_ranks - 1 - rank
        return rank + part * num_ranks

    def check(self, num_ranks: int, num_microbatches: int) -> None:
        """Check that the schedule can run.

        Raises:
            ConfigError: too few microbatches, or a number the schedule cannot deal out.
        """
        if num_ranks == 1:
            if self.stages_per_rank != 1:
                raise ConfigError(
                    f"{self.stages_per_rank} stages on each rank need a pipeline; pp is 1"
                )
            if self.activation_budget is not None:
                raise ConfigError(
                    "activation_budget chooses among the microbatches that are in flight in a "
                    "pipeline; pp is 1, where there is one at a time"
                )
            return
        least = 2 * num_ranks if self.schedule == "DualPipeV" else num_ranks
        least = 1 if self.schedule in ("GPipe", "LoopedBFS") else least
        if num_microbatches < least:
            raise ConfigError(
                f"{self.schedule} over {num_ranks} pipeline ranks needs at least {least} "
                f"microbatches in a step, found {num_microbatches}; raise the global batch size or "
                "lower the microbatch size"
            )
        dealt = self.schedule in ("Interleaved1F1B", "InterleavedZeroBubble")
        if dealt and num_microbatches % num_ranks:
            raise ConfigError(
                f"{self.schedule} over {num_ranks} pipeline ranks needs a multiple of {num_ranks} "
                f"microbatches in a step, found {num_microbatches}"
            )


def deal_layers(num_layers: int, num_stages: int) -> list[range]:
    """Consecutive layers for each stage, as even as can be; the first stages get one more.

    Raises:
        ConfigError: fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_layers} layers cannot fill {num_stages} pipeline stages; at most "
            f"{num_layers} stages"
        )
    least, more = divmod(num_layers, num_stages)
    starts = [stage * least + min(stage, more) for stage in range(num_stages + 1)]
    return [range(first, stop) for first, stop in pairwise(starts)]
