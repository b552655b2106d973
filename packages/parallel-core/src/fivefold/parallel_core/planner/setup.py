"""One way to train a model: the layout of ranks and everything that memory and time hang on."""

from dataclasses import dataclass, field
from typing import Literal

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.planner.models import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup(Config):
    """How a step runs.

    Attributes:
        world_size: number of ranks.
        tp, cp, pp, ep, etp: sizes of the axes, as ``Layout`` has them.
        sequence: activations between tensor-parallel layers are split along the sequence.
        length: tokens of a sequence.
        microbatch: sequences in a microbatch.
        global_batch: sequences in a step.
        recompute: "none", "selective" (the core of attention) or "full" (whole layers).
        pipeline: schedule and stages.
        data: what data ranks share.
        element_size: bytes of an activation.
        weight_size, gradient_size, optimizer_size: bytes for each parameter; 2 + 4 + 12 is mixed
            precision with float32 gradients, main weights and two moments.
        imbalance: tokens of the busiest expert rank over the mean.
        split_boundary: without sequence parallelism each tensor rank sends its part of a pipeline's
            boundary, which is gathered there (arXiv 2104.04473, section 4.1); runs of this package
            send the whole.
        overlap_sends: messages between pipeline stages run beside kernels.
    """

    world_size: int
    length: int
    global_batch: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    sequence: bool = True
    microbatch: int = 1
    recompute: Recompute = "none"
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataParallelConfig = field(default_factory=lambda: DataParallelConfig(form="zero1"))
    element_size: int = 2
    weight_size: int = 2
    gradient_size: int = 4
    optimizer_size: int = 12
    imbalance: float = 1.0
    split_boundary: bool = False
    overlap_sends: bool = False

    @property
    def layout(self) -> Layout:
        """The ranks; raises LayoutError where the sizes do not fit the world."""
        return Layout(self.world_size, tp=self.tp, cp=self.cp, pp=self.pp, ep=self.ep, etp=self.etp)

    @property
    def dp(self) -> int:
        """Data-parallel size of all but the experts."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def num_microbatches(self) -> int:
        """Of a pipeline, in a step."""
        return self.global_batch // (self.dp * self.microbatch)

    @property
    def parts(self) -> int:
        """Ranks among which activations outside of tensor-parallel layers are split."""
        return self.cp * (self.tp if self.sequence else 1)


def check(model: ModelShape, setup: Setup) -> None:
    """Check that a model can be trained so.

    Raises:
        LayoutError: the axes do not fit the world.
        ConfigError: something else does not divide; the message has the nearest legal choice.
    """
    setup.layout  # noqa: B018 - it raises
    reasons = _reasons(model, setup)
    if reasons:
        raise ConfigError("; ".join(reasons))
    setup.pipeline.check(setup.pp, setup.num_microbatches)
    setup.data.check(setup.layout)


def _reasons(model: ModelShape, setup: Setup) -> list[str]:
    experts = model.experts
    divides = [
        ("num_heads", model.num_heads, "tp", setup.tp),
        ("ffn", model.inner, "tp", setup.tp),
        ("length", setup.length, "cp * tp (sequence)", setup.parts),
        ("global_batch", setup.global_batch, "dp * microbatch", setup.dp * setup.microbatch),
    ]
    if experts is not None:
        divides += [
            ("num_experts", experts.num_experts, "ep", setup.ep),
            ("ffn of an expert", experts.ffn, "etp", setup.etp),
            ("shared_ffn", experts.shared_ffn, "tp", setup.tp),
        ]
    if model.mamba is not None:
        divides.append(("num_heads of mamba", model.mamba.num_heads, "tp", setup.tp))
    reasons = [
        f"{axis}={size} does not divide {name}={of}; nearest legal: {nearest_divisor(of, size)}"
        for name, of, axis, size in divides
        if of % size
    ]
    small, large = sorted((model.kv_heads, setup.tp))
    if large % small:
        near = min(
            (t for t in divisors(model.num_heads) if _fits(t, model.kv_heads)),
            key=lambda t: abs(t - setup.tp),
        )
        reasons.append(
            f"tp={setup.tp} and num_kv_heads={model.kv_heads} do not divide one another; "
            f"nearest legal: {near}"
        )
    stages = setup.pp * setup.pipeline.stages_per_rank
    if stages > model.num_layers:
        reasons.append(
            f"pp={setup.pp} x stages_per_rank={setup.pipeline.stages_per_rank} = {stages} stages "
            f"for num_layers={model.num_layers}; nearest legal: {model.num_layers} stages"
        )
    if experts is None and setup.ep * setup.etp > 1:
        reasons.append(
            f"ep={setup.ep}, etp={setup.etp} for {model.name}, which has no experts; nearest "
            "legal: 1"
        )
    return reasons


def _fits(tp: int, heads: int) -> bool:
    return max(tp, heads) % min(tp, heads) == 0


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` that is nearest to ``wanted``, the smaller of two."""
    return min(divisors(number), key=lambda d: (abs(d - wanted), d))


def describe(setup: Setup) -> str:
    """A mapping in a few words."""
    axes = " ".join(f"{name}{getattr(setup, name)}" for name in ("tp", "cp", "dp", "pp"))
    experts = f" etp{setup.etp} ep{setup.ep}" if setup.etp * setup.ep > 1 else ""
    parts = setup.pipeline.stages_per_rank
    return (
        f"{axes}{experts}{f' x{parts} stages' if parts > 1 else ''} microbatch {setup.microbatch} "
        f"recompute {setup.recompute} {setup.data.form}"
    )
