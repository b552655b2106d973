"""Bytes on one pipeline rank, term by term: what is trained, and what a step adds."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fivefold.parallel_core.data_parallel_config import WHOLE
from fivefold.parallel_core.pipeline_config import deal_layers
from fivefold.parallel_core.planner.activations import (
    first_terms,
    last_terms,
    layer_bytes,
    stage_terms,
    target_bytes,
)
from fivefold.parallel_core.planner.held import CLOSED, peak_held
from fivefold.parallel_core.planner.local import Local, Terms
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.parameters import ends_parameters, layer_parameters
from fivefold.parallel_core.planner.setup import Setup

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """What one pipeline rank holds at its peak.

    Attributes:
        rank: of the pipeline.
        terms: bytes by name.
    """

    rank: int
    terms: Terms

    @property
    def total(self) -> int:
        """Sum of the terms."""
        return sum(self.terms.values())


@lru_cache(maxsize=65536)
def split_layers(layers: str, num_stages: int) -> tuple[str, ...]:
    """Layers of each stage, dealt as a run deals them."""
    dealt = deal_layers(len(layers), num_stages)
    return tuple(layers[part.start : part.stop] for part in dealt)


def memory(model: ModelShape, setup: Setup) -> list[StageMemory]:
    """Every pipeline rank's memory; ``setup`` has passed ``check``."""
    return [stage_memory(model, setup, rank) for rank in range(setup.pp)]


def stage_memory(model: ModelShape, setup: Setup, rank: int) -> StageMemory:
    """One pipeline rank's memory."""
    terms = state_terms(model, setup, rank) | activation_terms(model, setup, rank)
    terms["workspace"] = workspace(model, setup, rank)
    return StageMemory(rank=rank, terms={name: n for name, n in terms.items() if n})


def stages_of(model: ModelShape, setup: Setup, rank: int) -> list[tuple[int, str]]:
    """Index and layers of each stage of a pipeline rank."""
    pipeline = setup.pipeline
    split = split_layers(model.layers, setup.pp * pipeline.stages_per_rank)
    indices = sorted(
        pipeline.stage_index(rank, part, setup.pp) for part in range(pipeline.stages_per_rank)
    )
    return [(index, split[index]) for index in indices]


def telling_ranks(model: ModelShape, setup: Setup) -> Iterable[int]:
    """Pipeline ranks among which the fullest and the slowest are.

    Where all layers are alike the first rank has as many of them and of microbatches as any, so
    only the last one, with the head, can have more.
    """
    known = setup.pipeline.schedule in CLOSED
    if known and len(set(model.layers)) == 1:
        return sorted({0, setup.pp - 1})
    return range(setup.pp)


def fullest(model: ModelShape, setup: Setup) -> StageMemory:
    """Memory of the pipeline rank that holds most."""
    ranks = telling_ranks(model, setup)
    return max((stage_memory(model, setup, rank) for rank in ranks), key=lambda m: m.total)


def _ends(setup: Setup, indices: list[int]) -> tuple[bool, bool]:
    return 0 in indices, setup.pp * setup.pipeline.stages_per_rank - 1 in indices


def stage_parameters(model: ModelShape, setup: Setup, rank: int) -> tuple[int, int]:
    """Parameters on a rank before data ranks share them: all but the experts', the experts'."""
    stages = stages_of(model, setup, rank)
    layers = "".join(letters for _, letters in stages)
    dense = ends_parameters(model, setup.tp, *_ends(setup, [index for index, _ in stages]))
    experts = 0
    for letter in set(layers):
        count = layer_parameters(model, letter, setup.tp, setup.ep, setup.etp)
        dense += layers.count(letter) * count.dense
        experts += layers.count(letter) * count.experts
    return dense, experts


def state_terms(model: ModelShape, setup: Setup, rank: int) -> Terms:
    """Weights, gradients and optimizer, of the experts by themselves."""
    dense, experts = stage_parameters(model, setup, rank)
    terms = _states(setup, "dense", dense, "dp-cp", setup.dp * setup.cp)
    return terms | _states(setup, "experts", experts, "edp", setup.edp)


def _states(setup: Setup, name: str, count: int, data: str, num_ranks: int) -> Terms:
    """Bytes between forward and backward of microbatches (arXiv 1910.02054).

    Gradients are summed over ranks once a step: with several microbatches each rank has them whole
    until then, whatever the form.
    """
    form = setup.data.form_of(data)
    ranks = setup.data.shard_size_of(data, num_ranks)
    shared = -(-count // ranks)
    whole = form in WHOLE
    return {
        # Shards are the main weights, which are the optimizer's; gathered ones are workspace.
        f"{name}.weights": setup.weight_size * count if whole else 0,
        f"{name}.gradients": setup.gradient_size
        * (count if whole or setup.num_microbatches > 1 else shared),
        f"{name}.optimizer": setup.optimizer_size * (count if form == "replicate" else shared),
    }


def activation_terms(model: ModelShape, setup: Setup, rank: int) -> Terms:
    """What autograd keeps at the schedule's peak, of the layers and of what is around them."""
    local = Local.of(setup)
    stages = stages_of(model, setup, rank)
    last = setup.pp * setup.pipeline.stages_per_rank - 1
    sizes = [sum(layer_bytes(model, local, x) for x in letters) for _, letters in stages]
    terms = {"layers": _peak(setup, rank, sizes)}
    sizes = [
        size + sum(stage_terms(model, local, letters).values())
        for size, (_, letters) in zip(sizes, stages, strict=True)
    ]
    for name, index, found in (("embedding", 0, first_terms), ("head", last, last_terms)):
        for part, (stage, _) in enumerate(stages):
            if stage == index:
                sizes[part] += sum(found(model, local).values())
        # The peak may move: a term is what it adds to those before it.
        terms[name] = _peak(setup, rank, sizes) - sum(terms.values())
    if stages[-1][0] == last:
        terms["head"] += target_bytes(model, local, setup.num_microbatches)
    return terms


def _peak(setup: Setup, rank: int, sizes: list[int]) -> int:
    return peak_held(setup.pipeline, rank, setup.pp, setup.num_microbatches, sizes)


def workspace(model: ModelShape, setup: Setup, rank: int) -> int:
    """What a layer makes and drops: its recomputed activations, or gathered rows and gradients.

    The larger of one layer as it is without recomputation (when layers are recomputed) and the
    gradients that flow through its widest product; and gathered parameters: under ZeRO-2 of all
    layers, from forward to backward, under ZeRO-3 of two, the second of which is fetched ahead.
    """
    local = Local.of(setup)
    letters = "".join(letters for _, letters in stages_of(model, setup, rank))
    flows = max(_transient(model, local, letter) for letter in set(letters))
    counts = [layer_parameters(model, x, setup.tp, setup.ep, setup.etp) for x in letters]
    flows += _gathered(setup, "dp-cp", [count.dense for count in counts])
    return flows + _gathered(setup, "edp", [count.experts for count in counts])


def _gathered(setup: Setup, data: str, counts: list[int]) -> int:
    form = setup.data.form_of(data)
    if form in WHOLE:
        return 0
    stays = form == "zero2" or setup.pp > 1  # a pipeline's backwards leave parameters gathered
    return setup.element_size * (sum(counts) if stays else 2 * max(counts))


def _transient(model: ModelShape, local: Local, letter: str) -> int:
    whole = layer_bytes(model, _stored(local), letter)
    flows = whole if local.recompute == "full" else whole - layer_bytes(model, local, letter)
    return flows + 2 * local.element_size * local.tokens * model.hidden


@lru_cache(maxsize=4096)
def _stored(local: Local) -> Local:
    names = Local.__dataclass_fields__
    return Local(**{name: getattr(local, name) for name in names} | {"recompute": "none"})


def boundary_saving(model: ModelShape, setup: Setup, rank: int) -> int:
    """What freeing a stage's sent output saves (arXiv 2205.05198, appendix B): undivided by tp."""
    held = min(setup.num_microbatches, setup.pp - rank)
    return setup.element_size * setup.microbatch * setup.length * model.hidden * held
