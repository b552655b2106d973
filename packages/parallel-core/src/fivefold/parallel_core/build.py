"""From a model's constructor to what one rank holds of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.parallel_core.context import SplitMixer, SplitPositions
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.data_parallel_config import DataParallelConfig
from fivefold.parallel_core.errors import ConfigError
from fivefold.parallel_core.losses import SideOutputs
from fivefold.parallel_core.parameters import ParameterTable, Piece, initialise
from fivefold.parallel_core.pipeline import (
    LocalRunner,
    PipelineRunner,
    Runner,
    keep_stage,
)
from fivefold.parallel_core.pipeline_config import PipelineConfig
from fivefold.parallel_core.plan import check_plan, parallelize, tie
from fivefold.parallel_core.regions import check_regions
from fivefold.parallel_core.sequence_split import Split, check_sequence
from fivefold.parallel_core.styles import Plan
from fivefold.parallel_core.tensor_parallel import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from fivefold.parallel_core.tied import Twin, check_ends, tied_names
from fivefold.parallel_core.topology import Topology


@dataclass(frozen=True, slots=True, eq=False)
class ParallelModel:
    """What one rank holds of a model.

    Attributes:
        parts: its pipeline stages, one unless the schedule is interleaved.
        table: placement of every parameter of the parts.
        topology: the ranks.
        twins: tied parameters of which this rank has both stages; a ``Runner`` keeps them equal.
    """

    parts: Sequence[nn.Module]
    table: ParameterTable
    topology: Topology
    twins: Sequence[Twin] = ()

    def pieces(self) -> list[Piece]:
        """This rank's pieces of all parameters."""
        return [piece for part in self.parts for piece in self.table.pieces(part)]

    def buffers(self) -> list[Piece]:
        """What the model keeps beside its parameters; see ``ParameterTable.buffers``."""
        return [piece for part in self.parts for piece in self.table.buffers(part)]

    def initialise(self, rule: Callable[[str], tuple[str, float]], seed: int) -> None:
        """Fill all parameters and buffers, independently of the layout.

        See ``parameters.initialise``.
        """
        with torch.no_grad():
            initialise([*self.pieces(), *self.buffers()], rule, seed)

    def after_step(self, totals: Mapping[str, Tensor]) -> None:
        """Tell the parts that have such a method what a step's side outputs were in all.

        Args:
            totals: of ``drain_side_outputs``, summed over the ranks.
        """
        for part in self.parts:
            method = getattr(part, "after_step", None)
            if callable(method):
                method(totals)

    def train(self, mode: bool = True) -> None:
        """Set every part's training mode."""
        for part in self.parts:
            part.train(mode)

    def _sides(self) -> list[SideOutputs]:
        found = (getattr(part, "side", None) for part in self.parts)
        return [side for side in found if isinstance(side, SideOutputs)]

    def weigh_side_losses(self, weight: float) -> None:
        """Set the gradient of the total loss with respect to every side loss."""
        for side in self._sides():
            side.weight = weight

    def drain_side_outputs(self) -> Mapping[str, Tensor]:
        """Totals of the side outputs of all parts since the last call."""
        totals: dict[str, Tensor] = {}
        for side in self._sides():
            for name, value in side.drain().items():
                totals[name] = totals[name] + value if name in totals else value
        return totals


def build(
    make: Callable[[], nn.Module],
    topology: Topology,
    plan: Plan,
    *,
    head: Sequence[str],
    tail: Sequence[str],
    pipeline: PipelineConfig | None = None,
    precision: Precision | None = None,
    data_parallel: DataParallelConfig | None = None,
    dtype: torch.dtype | None = None,
    regions: str | Sequence[str] = "none",
) -> ParallelModel:
    """Make this rank's part of a model with storage but no values.

    The whole model exists on the meta device only, so its size does not matter here.

    Args:
        make: makes the whole model.
        topology: the ranks.
        plan: how modules lie over the model axes.
        head: modules of the first pipeline stage only.
        tail: modules of the last pipeline stage only.
        pipeline: schedule; the default has one stage on each rank.
        precision: dtypes for training; None for inference.
        data_parallel: what is sharded over the data axes in training; None is the default.
        dtype: of the parameters where ``precision`` is None.
        regions: what backward recomputes; see ``recompute``. Not whole layers where ``pipeline``
            has an ``activation_budget``, which chooses the microbatches whose layers are.
    """
    pp = topology.axis("pp")
    pipeline = PipelineConfig() if pipeline is None else pipeline
    per_rank = pipeline.stages_per_rank
    on_request = "none" if pipeline.activation_budget is None else "full"
    table = ParameterTable(topology)
    parts: list[nn.Module] = []
    tied: dict[str, str] = {}
    for i in range(per_rank):
        with torch.device("meta"):
            part = make().to(precision.storage_dtype if precision else dtype)
        if pp.size > 1:
            tied = tied_names(part)
            check_ends(tied, head, tail)
        check_plan(part, plan)
        check_regions(part, regions)
        check_regions(part, on_request)
        stage = pipeline.stage_index(pp.rank, i, pp.size)
        keep_stage(part, stage, pp.size * per_rank, head=head, tail=tail)
        parallelize(part, topology, plan, precision, table, regions, on_request, data_parallel)
        part.to_empty(device=topology.device)
        tie(part)
        parts.append(part)
    # When all parts are in the table, as one rank may have both ends.
    both = [(original, name) for name, original in tied.items() if table.tie(name, original)]
    twins = [Twin(table, parts[0], original, parts[-1], name) for original, name in both]
    model = ParallelModel(parts, table, topology, twins)
    for piece in model.pieces():
        # What fills the pieces leaves out their padding, and a gradient of 0 times NaN is NaN.
        if piece.local.shape != piece.tensor.shape:
            piece.local.zero_()
    return model


def make_runner(
    model: ParallelModel,
    pipeline: PipelineConfig,
    *,
    num_microbatches: int,
    microbatch_size: int,
    sequence_length: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> Runner:
    """What runs a language model's microbatches on this rank.

    Args:
        model: from ``build``.
        pipeline: the schedule that ``model`` was built for.
        num_microbatches: of a step on this rank.
        microbatch_size: sequences in one.
        sequence_length: tokens of a whole sequence.
        hidden_size: width between layers.
        vocab_size: without padding.
        dtype: of activations.

    Raises:
        ConfigError: the sequence does not divide over the ranks, or the plan splits it in two ways.
    """
    layout = model.topology.layout
    tp = layout.tp if _has_sequence_parallelism(model.parts) else 1
    check_sequence(sequence_length, cp=layout.cp, tp=tp, split=_split_of(model.parts))
    if layout.pp == 1:
        return LocalRunner(model.parts[0], num_microbatches)
    length = sequence_length // layout.cp
    return PipelineRunner(
        model.parts,
        model.topology,
        pipeline,
        num_microbatches,
        ids=(microbatch_size, length),
        hidden=(microbatch_size, length // tp, hidden_size),
        logits=(microbatch_size, length, -(-vocab_size // layout.tp)),
        dtype=dtype,
        twins=model.twins,
    )


def _split_of(parts: Sequence[nn.Module]) -> Split:
    """How the modules that know of context parallelism split a sequence.

    Raises:
        ConfigError: in two ways.
    """
    found: dict[Split, str] = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, (SplitMixer, SplitPositions)):
                found.setdefault(module.split, name)
    if len(found) > 1:
        ways = " and ".join(f"{split} at {name!r}" for split, name in found.items())
        raise ConfigError(f"the plan splits sequences {ways}; it needs one way for all")
    return next(iter(found), "contiguous")


def _has_sequence_parallelism(parts: Sequence[nn.Module]) -> bool:
    """Whether the sequence is split over "tp" as well between the layers."""
    kinds = (ColumnParallelLinears, RowParallelLinear, VocabParallelEmbedding)
    modules = (module for part in parts for module in part.modules())
    return any(module.sequence for module in modules if isinstance(module, kinds))
