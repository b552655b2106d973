"""Figures of arXiv 2205.05198 in the paper's own counting, which leaves small terms out."""

from fivefold.parallel_core.planner.activations import layer_terms
from fivefold.parallel_core.planner.held import peak_held
from fivefold.parallel_core.planner.local import Local
from fivefold.parallel_core.planner.models import ModelShape
from fivefold.parallel_core.planner.setup import Setup

_STATISTICS = ("native_layer_norm.1", "native_layer_norm.2")


def layer_activations(model: ModelShape, setup: Setup) -> int:
    """Bytes of one block for one microbatch, as table 2 counts: without the norms' statistics."""
    terms = layer_terms(model, Local.of(setup), "T")
    return sum(size for name, size in terms.items() if not name.endswith(_STATISTICS))


def layers_activations(model: ModelShape, setup: Setup) -> int:
    """Bytes of all blocks that the first pipeline rank holds, as figure 1 counts."""
    stages = setup.pp * setup.pipeline.stages_per_rank
    # The paper lets stages have a fraction of a layer: L (1 + (p - 1) / (p m)) blocks.
    sizes = [layer_activations(model, setup) * model.num_layers] * setup.pipeline.stages_per_rank
    return peak_held(setup.pipeline, 0, setup.pp, setup.num_microbatches, sizes) // stages


def layers_states(model: ModelShape, setup: Setup) -> int:
    """Bytes of weights, gradients and optimizer as figure 1 counts: matrices of blocks alone."""
    each = setup.weight_size + setup.gradient_size + setup.optimizer_size
    return each * 12 * model.num_layers * model.hidden**2 // (setup.tp * setup.pp)
