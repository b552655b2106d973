"""What a compression is told: calibration, memory, grid, ranking, distillation."""

from dataclasses import dataclass, field
from typing import Literal

from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.fp8.config import FP8Config
from fivefold.parallel_core.config import Config
from fivefold.parallel_core.training.run import DataConfig, LayoutConfig

Aggregate = Literal["mean", "l2"]


def _at_least(owner: Config, least: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < least:
            raise HybridConfigError(f"{name} is {value}; it must be at least {least:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceConfig(Config):
    """How layers, neurons, heads and experts are scored, by forward passes alone.

    Attributes:
        layer_samples: sequences over which a layer's score is averaged (128 in the paper).
        neuron_samples: sequences over which the others are (1024 in the paper).
        sequence_length: tokens of one.
        batch_size: sequences that go through the model at once; each pass reads all weights once.
        over_sequence: what is taken of a neuron's magnitudes over the tokens of a sequence.
        over_batch: what is taken of that over sequences. The paper names mean and L2 and not which
            is which; mean, then L2, is what NVIDIA's Model-Optimizer does.
        mamba_heads: whether heads of Mamba-2 layers are scored, which is needed to prune them.
        seed: of the choice of sequences.
    """

    layer_samples: int = 128
    neuron_samples: int = 1024
    sequence_length: int = 1024
    batch_size: int = 4
    over_sequence: Aggregate = "mean"
    over_batch: Aggregate = "l2"
    mamba_heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "layer_samples", "neuron_samples", "sequence_length", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig(Config):
    """What inference keeps, in bits a value.

    The defaults pass the paper's arithmetic: 56.3 billion parameters at 4.5 bits (4 and a scale of
    8 for each 16) are 29.51 GiB.

    Attributes:
        weight_bits: of weights.
        embedding_bits: of the token embedding and the output layer; None is ``weight_bits``.
        kv_bits: of keys and values.
        state_bits: of Mamba-2 states and of the convolutions' last inputs.
        context_length: tokens of keys and values, of one sequence.
        batch_size: sequences at once.
        workspace_bytes: set aside for activations and the like.
    """

    weight_bits: float = 4.5
    embedding_bits: float | None = None
    kv_bits: float = 4.5
    state_bits: float = 16.0
    context_length: int = 1_000_000
    batch_size: int = 1
    workspace_bytes: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0.5, "weight_bits", "embedding_bits", "kv_bits", "state_bits")
        _at_least(self, 0, "context_length", "workspace_bytes")
        _at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig(Config):
    """The grid of candidates, and how many of them go on.

    Of each kind of layer a candidate keeps the best so many; empty lists mean a range from half of
    the parent's to all of them, in steps that give at most seven values.

    Attributes:
        attention: numbers of attention layers.
        mamba: numbers of Mamba-2 layers.
        mlp: numbers of feed-forward layers.
        moe: numbers of expert layers.
        widths: inner widths, one for all feed-forward layers of a candidate; empty is from three
            quarters of the parent's to all of it in nine values, as in the paper.
        experts: numbers of routed experts, one for all layers; empty keeps the parent's.
        mamba_heads: numbers of heads of all Mamba-2 layers; empty keeps the parent's. The paper
            tried fewer heads and found that they hurt badly, and narrower ones even more: leave it
            empty unless you measure.
        least_use: candidates that need less than this share of the budget are left out.
        validation_sequences: held-out sequences on which candidates are ranked.
        num_ranked: how many of the best ranked go to the benchmark callback, if there is one.
        num_finalists: how many are distilled for a short time.
    """

    attention: tuple[int, ...] = ()
    mamba: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    moe: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    mamba_heads: tuple[int, ...] = ()
    least_use: float = 0.9
    validation_sequences: int = 128
    num_ranked: int = 130
    num_finalists: int = 3

    def __post_init__(self) -> None:
        _at_least(self, 1, "validation_sequences", "num_ranked", "num_finalists")
        if not 0 <= self.least_use < 1:
            raise HybridConfigError(
                f"least_use is {self.least_use}; a share of the budget from 0 up to below 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(Config):
    """How students learn from the parent: forward KL of the logits.

    Attributes:
        short_steps: optimizer steps of each finalist.
        long_steps: of the winner, from its short distillation's weights; 0 ends there.
        temperature: by which both models' logits are divided; 1 in the paper.
        global_batch_size: sequences of a step.
        microbatch_size: sequences at once on one rank.
        sequence_length: tokens of a sequence.
        learning_rate: its peak; the paper does not say one.
        warmup_steps: of the learning rate.
        min_ratio: its last value over its peak; the paper's pretraining ends at 1 %.
        weight_decay: of matrices.
        gradient_clip: largest norm of the gradient; None for no limit.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations on held-out text; None for only the last.
        compute: what is computed in.
        fp8: which of the student's products are in FP8, as in the paper; None for none.
        cache_logits: keep the parent's logits on disk, so that all finalists share them. It takes
            vocabulary × 4 bytes (2 in bfloat16) for each token.
        layout: degrees of the ranks; one pipeline stage.
        seed: of the order of the text.
    """

    short_steps: int = 200
    long_steps: int = 0
    temperature: float = 1.0
    global_batch_size: int = 8
    microbatch_size: int = 8
    sequence_length: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    min_ratio: float = 0.01
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0
    checkpoint_every: int = 50
    evaluate_every: int | None = 50
    compute: Literal["float32", "float64", "bfloat16"] = "float32"
    fp8: FP8Config | None = None
    cache_logits: bool = False
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    seed: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "short_steps", "global_batch_size", "microbatch_size", "sequence_length")
        _at_least(self, 0, "long_steps")
        if self.temperature <= 0:
            raise HybridConfigError(f"temperature is {self.temperature}; it must be above 0")
        if self.layout.pp != 1:
            raise HybridConfigError(
                f"layout.pp is {self.layout.pp}; teacher and student differ in depth, so "
                "distillation has one pipeline stage: use tp, cp, ep and data ranks"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig(Config):
    """All of a compression, as in the sections of its TOML file.

    Attributes:
        budget: "31.7GiB", "8GB", "24000MB", or a share of the parent's memory such as "80%".
        data: text for scores, ranking and distillation; where its tokenizer is left at "bytes" and
            the model's folder has one, that is used.
        packed: whether a document sees only itself, as the parent was trained.
    """

    budget: str
    packed: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
