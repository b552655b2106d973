"""How parameters, gradients and optimizer state lie over the ranks that see other data."""

from dataclasses import dataclass
from typing import Literal

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout

Form = Literal["replicate", "zero1", "zero2", "zero3"]
WHOLE: tuple[Form, ...] = ("replicate", "zero1")
"""Forms in which a rank has the whole of each parameter; FSDP has the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataParallelConfig(Config):
    """What each rank keeps, in the words of ZeRO (arXiv 1910.02054).

    Attributes:
        form: "replicate": everything on every rank; "zero1": the optimizer's state is sharded;
            "zero2": the gradients too, and the parameters outside of forward and backward (FSDP);
            "zero3": the parameters also between forward and backward, where they are gathered
            again.
        shard_size: ranks that share one copy of what is sharded; copies lie on the remaining ranks
            (hybrid sharding). It divides dp * cp; None is all of them.
        expert_form: of the experts' parameters; None is ``form``.
        expert_shard_size: of the experts, whose data axis is edp; None is all of it.
        overlap: begin to reduce gradients of whole parameters ("replicate", "zero1") while the last
            backward of a step still runs, on process groups of their own; in a pipeline they are
            reduced after it. FSDP ("zero2", "zero3") always overlaps.
    """

    form: Form = "zero2"
    shard_size: int | None = None
    expert_form: Form | None = None
    expert_shard_size: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        for name, data in (("shard_size", "dp-cp"), ("expert_shard_size", "edp")):
            size = getattr(self, name)
            if size is not None and self.form_of(data) == "replicate":
                raise ConfigError(
                    f"{name}={size} of the form 'replicate', which has no shards; leave it out, or "
                    "choose 'zero1', 'zero2' or 'zero3'"
                )
            if size is not None and size < 1:
                raise ConfigError(f"{name}={size}; it must be at least 1")

    def form_of(self, data: str) -> Form:
        """The form of the parameters whose data axes are ``data``, "dp-cp" or "edp"."""
        if data == "edp" and self.expert_form is not None:
            return self.expert_form
        return self.form

    def shard_size_of(self, data: str, num_ranks: int) -> int:
        """Ranks that share one copy where the data axes have ``num_ranks``.

        Raises:
            ConfigError: the size asked for does not divide them.
        """
        if self.form_of(data) == "replicate":
            return 1
        name = "expert_shard_size" if data == "edp" else "shard_size"
        size: int | None = getattr(self, name)
        if size is None:
            return num_ranks
        if num_ranks % size:
            legal = ", ".join(str(d) for d in range(1, num_ranks + 1) if num_ranks % d == 0)
            raise ConfigError(
                f"{name}={size} does not divide the {num_ranks} ranks of {data}; legal: {legal}"
            )
        return size

    def check(self, layout: Layout) -> None:
        """Check that the shards fit a layout.

        Raises:
            ConfigError: a size that does not divide its axes.
        """
        for data in ("dp-cp", "edp"):
            self.shard_size_of(data, layout.axis_size(data))
