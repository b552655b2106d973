"""Steps of AlphaFold's training (supplement, section 1.11) on the common loop."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fivefold.fold.data.dataset import Chains
from fivefold.fold.losses.total import alphafold_loss
from fivefold.fold.metrics import lddt_ca
from fivefold.fold.model.alphafold import AlphaFold
from fivefold.fold.sharding import AXIS
from fivefold.fold.training.average import MovingAverage
from fivefold.fold.training.config import RunConfig
from fivefold.fold.training.samples import Sample, seed_of
from fivefold.fold.training.scoring import placed, score_chains
from fivefold.parallel_core.build import ParallelModel
from fivefold.parallel_core.checkpoint import Checkpoints, TensorPart
from fivefold.parallel_core.data_parallel import add_gradients, gather_mains, reduce_gradients
from fivefold.parallel_core.gradients import sum_parts
from fivefold.parallel_core.training.base_loop import Loop
from fivefold.parallel_core.training.state import Progress
from fivefold.parallel_core.training.totals import Totals

_LOG = logging.getLogger(__name__)


class Samples(Protocol):
    """What a run learns from: this rank's samples of any step, in the order that they count."""

    def of(self, step: int) -> list[Sample]:
        """The samples; what could not be used is named in them."""
        ...

    def close(self) -> None:
        """End what makes samples ahead."""
        ...


class FoldTrainer(Loop):
    """Trains one network; every rank makes one and calls the same methods.

    Attributes:
        heldout_loss: 1 - the mean lDDT-CA of the last evaluation.

    Args:
        config: the run.
        model: this rank's copy.
        samples: of this rank.
        heldout: chains to score; none are scored where there are none.
        checkpoints: where to save; None saves nothing.
        identity: plain data that a resumed run must share.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ParallelModel,
        samples: Samples,
        heldout: Chains | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        identity: Mapping[str, Any] | None = None,
    ):
        training = config.training
        whole = {"global_batch_size": training.global_batch_size, **(identity or {})}
        super().__init__(training, model, checkpoints=checkpoints, identity=whole)
        self.run, self.samples, self.heldout = config, samples, heldout
        network = model.parts[0]
        if not isinstance(network, AlphaFold):
            raise TypeError(f"FoldTrainer trains an AlphaFold, not a {type(network).__name__}")
        self.network = network
        # In the dtype that forward computes in; what is updated are the pieces.
        self._parameters = dict(network.named_parameters())
        self.average = MovingAverage(self.pieces) if training.ema_decay is not None else None
        self._heldout_totals = Totals(self.topology.world)
        self._first = self.topology.rank(AXIS) == 0
        self._waited = 0.0

    def parts(self) -> dict[str, TensorPart]:
        """See ``Loop.parts``; with the moving average."""
        return super().parts() | (self.average.parts() if self.average else {})

    def resumed(self, progress: Progress) -> None:
        """See ``Loop.resumed``: a run that had reached its target has nothing more to do."""
        if progress.heldout_loss is not None:
            self._keep_heldout_loss(progress.heldout_loss)
            self._look_at_target(progress.heldout_loss)

    def backward(self) -> dict[str, Tensor]:
        """See ``Loop.backward``: sums over samples of the loss, its terms and lDDT-CA."""
        gather_mains(self.network)
        sums: dict[str, Tensor] = {}
        start = time.perf_counter()
        samples = self.samples.of(self.step)
        self._waited = time.perf_counter() - start
        for sample in samples:
            self._say(f"left out of sample {sample.number}", sample.problems)
            # What dropout draws follows from the sample alone, wherever and whenever it is used.
            torch.manual_seed(seed_of(self.run.training.seed, sample.number))
            for name, value in self._learn(sample).items():
                sums[name] = sums[name] + value if name in sums else value
        reduce_gradients(self.network)
        return self._once(sums)

    def sum_gradients(self) -> None:
        """See ``Loop.sum_gradients``: done, sample by sample, before they were clipped."""

    def _once(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ranks that share a sample all found, for sums over all ranks."""
        if self._first:
            return sums
        return {name: torch.zeros_like(value) for name, value in sums.items()}

    def _learn(self, sample: Sample) -> dict[str, Tensor]:
        """Add a sample's clipped gradient to the step's; what to tell of it."""
        training = self.run.training
        dtype = training.precision.storage_dtype
        cycles = [placed(each, self.topology.device, dtype) for each in sample.features]
        outputs = self.network(cycles)
        batch = cycles[-1]
        loss, terms = alphafold_loss(outputs, batch, self.run.loss)
        weight = batch["seq_mask"].sum().sqrt() if training.scale_by_length else 1.0
        found = torch.autograd.grad(
            loss * weight, list(self._parameters.values()), allow_unused=True
        )
        grads = {n: g for n, g in zip(self._parameters, found, strict=True) if g is not None}
        grads = sum_parts(grads, self.model.table)
        norm = _norm(grads.values())
        scale = _clipping(norm, training.sample_gradient_clip)
        add_gradients(self.network, grads, scale / training.global_batch_size)
        positions = outputs["structure_module"]["final_atom_positions"].detach()
        lddt = lddt_ca(positions, batch["all_atom_positions"], batch["all_atom_mask"])
        told = {"loss": loss, **terms, "lddt_ca": lddt.nan_to_num(), "sample_norm": norm}
        counts = {
            "clipped": float(scale < 1),
            "num_recycles": len(cycles) - 1.0,
            "unusable": float(len(sample.problems)),
        }
        device = self.topology.device
        told |= {name: torch.tensor(value, device=device) for name, value in counts.items()}
        return {name: value.detach().double() for name, value in told.items()}

    def describe(self, sums: Mapping[str, Tensor], seconds: float) -> dict[str, float]:
        """See ``Loop.describe``: means over samples, samples a second, and what rank 0 waited."""
        size = self.run.training.global_batch_size
        means = {name: float(value) / size for name, value in sums.items() if name != "unusable"}
        unusable = {"unusable_chains": float(sums["unusable"])} if sums["unusable"] > 0 else {}
        times = {"waiting_seconds": self._waited, "samples_per_second": size / seconds}
        return {**means, **unusable, **times}

    def after_update(self, sums: Mapping[str, Tensor]) -> None:
        """See ``Loop.after_update``: the average follows."""
        super().after_update(sums)
        if self.average is not None:
            self.average.update(self.run.training.decay(self.step))

    def evaluate(self) -> float | None:
        """Score whole chains with the moving average; 1 - the mean, None where none could be."""
        if self.heldout is None or not len(self.heldout):
            return None
        self.model.train(False)
        if self.average is None:
            score = self._score(self.heldout)
        else:
            with self.average.in_place():
                score = self._score(self.heldout)
        if score is not None:
            self._keep_heldout_loss(1 - score)
            self._look_at_target(1 - score)
            self._tell({"heldout_lddt_ca": score})
        return self.heldout_loss

    def _score(self, heldout: Chains) -> float | None:
        gather_mains(self.network)
        axis = self.topology.axis("dp-cp")
        found = score_chains(
            self.network,
            heldout,
            self.run.features,
            self.run.evaluation_recycles,
            rank=axis.rank,
            size=axis.size,
        )
        self._say("cannot be scored", found.problems)
        sums = self._heldout_totals.sum(self._once(found.sums))
        num = float(sums["scored"].sum())
        return float(sums["scores"].sum()) / num if num else None

    def _look_at_target(self, loss: float) -> None:
        target = self.run.evaluation.target
        self.reached = target is not None and 1 - loss >= target

    def _say(self, what: str, problems: Iterable[str]) -> None:
        """Name where it is seen, but once, what could not be used."""
        for problem in problems if self._first else ():
            _LOG.warning("%s: %s", what, problem)


def _norm(grads: Iterable[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(grads))
    return torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))


def _clipping(norm: Tensor, limit: float | None) -> float:
    """By what to multiply a gradient; NaN where it is not finite, so that the step is skipped."""
    found = float(norm)
    if not math.isfinite(found):
        return math.nan
    return 1.0 if limit is None or found <= limit else limit / found
