"""What a training run is told, as in the sections of its TOML file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fivefold.fold.config import AlphaFoldConfig, FeatureConfig, LossConfig
from fivefold.fold.errors import FoldConfigError
from fivefold.fold.presets import preset
from fivefold.parallel_core.config import Config, load_toml, override
from fivefold.parallel_core.data_parallel_config import WHOLE, DataParallelConfig
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.training.loop_config import LoopConfig, at_least_one
from fivefold.parallel_core.training.optimizer import AdamWConfig

NONE = "none"
"""What a file writes for a part of the network that is left out; TOML has no null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """What a network is trained on.

    Attributes:
        prepared: folder that ``fivefold-fold prepare`` wrote, or that is made from ``structures``.
        structures: folder of mmCIF or PDB files, prepared first; None where that was done.
        alignments: folder of their alignments; see ``data.prepare.prepare``.
        templates: folder of structures for their templates, likewise.
        chains: names of the chains to train on; empty for all that are not held out.
        heldout: names of the chains to score and never train on.
        heldout_fraction: share of the other sequences that are held out besides; equal sequences
            go together.
        sampling: how often chains are drawn; see ``data.dataset.sampling_weights``.
        clusters: file with a cluster of chains a line, for ``sampling``; None takes equal
            sequences.
        num_workers: threads that make samples ahead of the step; 0 makes them within it.
    """

    prepared: str
    structures: str | None = None
    alignments: str | None = None
    templates: str | None = None
    chains: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    heldout_fraction: float = 0.0
    sampling: Literal["alphafold", "mlperf", "uniform"] = "alphafold"
    clusters: str | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise FoldConfigError(
                f"heldout_fraction is at least 0 and below 1, found {self.heldout_fraction}"
            )
        if self.num_workers < 0:
            raise FoldConfigError(f"num_workers is at least 0, found {self.num_workers}")
        both = sorted(set(self.chains) & set(self.heldout))
        if both:
            raise FoldConfigError(f"{', '.join(both)}: both in chains and in heldout; choose one")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(Config):
    """How a network is scored while it is trained.

    Attributes:
        target: mean lDDT-CA at which training ends; None for never.
        num_recycles: iterations before the one that is scored; None is ``features.num_recycles``.
        max_length: residues of the longest chain that is scored.
        max_chains: at most so many chains, the first; None for all.
        on_training_chains: score what is trained on, to see that a network can learn it.
    """

    target: float | None = None
    num_recycles: int | None = None
    max_length: int = 700
    max_chains: int | None = None
    on_training_chains: bool = False

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target <= 1:
            raise FoldConfigError(f"target is an lDDT above 0 and at most 1, found {self.target}")
        for name in ("num_recycles", "max_length", "max_chains"):
            value, least = getattr(self, name), 0 if name == "num_recycles" else 1
            if value is not None and value < least:
                raise FoldConfigError(f"{name} is at least {least}, found {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldTrainingConfig(LoopConfig):
    """A training run (supplement, section 1.11); a sample is a crop.

    Attributes:
        sample_gradient_clip: largest norm of one sample's gradient (0.1 in section 1.11.3); None
            for no limit. ``gradient_clip`` limits that of their mean.
        scale_by_length: multiply the loss of a sample by the root of its number of residues, as
            AlphaFold does (section 1.11.3); it changes how samples weigh, not which is best.
        ema_decay: of the moving average of the parameters that is scored and published (0.999 in
            section 1.11.7); None for the parameters themselves.
        ema_warmup: let the average follow faster at first, with decay (1 + step) / (10 + step), so
            that short runs forget where they began.
        dap: ranks that share a sample (dynamic axial parallelism); a divisor of their number. It
            changes no result and may change when a run goes on.
    """

    sample_gradient_clip: float | None = 0.1
    gradient_clip: float | None = None
    scale_by_length: bool = True
    ema_decay: float | None = 0.999
    ema_warmup: bool = False
    dap: int = 1
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    )
    data_parallel: DataParallelConfig = field(
        default_factory=lambda: DataParallelConfig(form="replicate")
    )
    recompute: str = "full"

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)
        at_least_one("dap", self.dap)
        if self.sample_gradient_clip is not None and not self.sample_gradient_clip > 0:
            raise FoldConfigError(
                f"sample_gradient_clip is a positive norm, found {self.sample_gradient_clip}; "
                "leave it out for AlphaFold's, or write none on the command line for no limit"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise FoldConfigError(f"ema_decay is at least 0 and below 1, found {self.ema_decay}")
        if self.data_parallel.form not in WHOLE:
            raise FoldConfigError(
                f"data_parallel.form is {self.data_parallel.form!r}; the clipping of each sample "
                f"needs the whole of its gradient on a rank: {', '.join(WHOLE)}"
            )

    def decay(self, step: int) -> float:
        """Of the moving average, after ``step`` finished steps; 0 without one."""
        if self.ema_decay is None:
            return 0.0
        early = (1 + step) / (10 + step) if self.ema_warmup else 1.0
        return min(self.ema_decay, early)

    def layout(self, world_size: int) -> Layout:
        """Of so many ranks, of which neighbours share a sample.

        Raises:
            FoldConfigError: ``dap`` does not divide them.
        """
        if world_size % self.dap:
            legal = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
            raise FoldConfigError(
                f"dap={self.dap} does not divide {world_size} ranks; choose one of {legal}, or a "
                f"multiple of {self.dap} ranks (--nproc)"
            )
        return Layout(world_size, tp=self.dap)

    def samples_per_rank(self, layout: Layout) -> int:
        """Of one step.

        Raises:
            FoldConfigError: they do not divide over the ranks.
        """
        if self.global_batch_size % layout.dp:
            raise FoldConfigError(
                f"global_batch_size={self.global_batch_size} does not divide over "
                f"{layout.dp} ranks; choose a multiple of {layout.dp}"
            )
        return self.global_batch_size // layout.dp


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """All of a run."""

    model: AlphaFoldConfig
    features: FeatureConfig
    loss: LossConfig
    data: DataConfig
    training: FoldTrainingConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.model.template is not None and self.features.max_templates < 1:
            raise FoldConfigError(
                "features.max_templates is 0, but the network takes templates; write "
                f"template = {NONE!r} under [model], or give them a row"
            )
        if self.model.template is None and self.features.max_templates:
            raise FoldConfigError(
                f"features.max_templates is {self.features.max_templates}, but the network takes "
                "no templates; set it to 0"
            )

    @property
    def evaluation_recycles(self) -> int:
        """Iterations before the one that is scored."""
        asked = self.evaluation.num_recycles
        return self.features.num_recycles if asked is None else asked


def load_run(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Read a run's configuration.

    The sections ``[model]``, ``[features]`` and ``[loss]`` change single values of ``preset``; the
    schedule ends with the run where it does not say otherwise.

    Args:
        source: a TOML file, or the same as a mapping.
        overrides: dotted key to text, as from the command line.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that cannot be.
    """
    raw = dict(load_toml(source)) if isinstance(source, (str, Path)) else dict(source)
    overrides = dict(overrides or {})
    name = overrides.pop("preset", raw.pop("preset", None))
    if name is not None:
        if not isinstance(name, str):
            raise FoldConfigError(f"preset: found {name!r}, expected a name")
        known = preset(name)
        for part in ("model", "features", "loss"):
            raw[part] = _merged(getattr(known, part).to_dict(), raw.get(part, {}), part)
    _end_with_run(raw, overrides)
    return override(RunConfig.from_dict(raw), overrides)


def _merged(base: Any, changes: Any, where: str) -> Any:
    """``base`` with the values of a table in place of its own."""
    if not isinstance(changes, Mapping):
        return None if changes == NONE else changes
    if not isinstance(base, Mapping):
        return dict(changes)
    return {**base, **{k: _merged(base.get(k), v, f"{where}.{k}") for k, v in changes.items()}}


def _end_with_run(raw: dict[str, Any], overrides: dict[str, str]) -> None:
    training = raw.get("training")
    if not isinstance(training, Mapping) or "steps" not in training:
        return
    schedule = training.get("schedule", {})
    if isinstance(schedule, Mapping) and "total_steps" not in schedule:
        # A constant rate after the warm-up is AlphaFold's, as long as most runs here are.
        schedule = {"kind": "constant", **schedule, "total_steps": training["steps"]}
        raw["training"] = {**training, "schedule": schedule}
        if "training.steps" in overrides:
            overrides.setdefault("training.schedule.total_steps", overrides["training.steps"])
