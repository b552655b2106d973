"""What the training run of a language model is told beside what every run is."""

from dataclasses import dataclass, field

from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.training.loop_config import LoopConfig, at_least_one


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(LoopConfig):
    """A training run of a language model; a sample is a sequence.

    Attributes:
        microbatch_size: sequences that go through the model at once on one rank.
        sequence_length: tokens in a sequence.
        evaluation_sequences: held-out sequences of an evaluation; None for all.
        pipeline: schedule over the pipeline ranks.
    """

    microbatch_size: int
    sequence_length: int
    evaluation_sequences: int | None = None
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)
        for name in ("microbatch_size", "sequence_length", "evaluation_sequences"):
            at_least_one(name, getattr(self, name))

    def num_microbatches(self, dp: int, pp: int) -> int:
        """Microbatches of a step on one rank.

        Raises:
            ConfigError: the batch does not divide, or the schedule needs more microbatches.
        """
        share = dp * self.microbatch_size
        if self.global_batch_size % share:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of dp * "
                f"microbatch_size = {dp} * {self.microbatch_size} = {share}"
            )
        count = self.global_batch_size // share
        self.pipeline.check(pp, count)
        return count
