"""The loss is per token: ranks with unequal numbers of valid tokens, and with none, train right.

Legend: B sequences of the global batch, S tokens of a sequence.
"""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Axis, Topology
from fivefold.parallel_core.training import loop
from fivefold.parallel_core.training.loop import Trainer, TrainingConfig
from fivefold.parallel_core.training.optimizer import AdamWConfig
from fivefold.parallel_core.training.schedule import WarmupCosine

from ..rig import DOUBLE, SEED, plain_model
from ..toy import HEAD, TAIL, Toy, ToyConfig, plan, rule

BATCH, LENGTH, STEPS, RATE = 4, 8, 2, 1e-2
MODEL = ToyConfig(num_layers=1)
ADAMW = AdamWConfig(eps=1e-2, weight_decay=0.0)  # a large eps notices the scale of gradients
FORMS: list[Form] = ["replicate", "zero1", "zero2", "zero3"]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of dp=2 and cp=2 the ranks have 4, 0, 8 and 5 valid tokens; in step 1 the first has none."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randint(0, MODEL.vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, 4:] = targets[1] = targets[3, 5:] = -100
    if step == 1:
        targets[0, :4] = -100
    return inputs, targets


class Data:
    """This rank's sequences and positions."""

    def __init__(self, topology: Topology):
        self.dp, self.cp = topology.axis("dp"), topology.axis("cp")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (
            whole.chunk(self.dp.size)[self.dp.rank].chunk(self.cp.size, 1)[self.cp.rank]
            for whole in batch(step)
        )
        return inputs.contiguous(), targets.contiguous()


def trainer(topology: Topology, form: Form, microbatch_size: int) -> Trainer:
    """Of the toy, without clipping, which would hide a wrong scale."""
    config = TrainingConfig(
        steps=STEPS,
        global_batch_size=BATCH,
        microbatch_size=microbatch_size,
        sequence_length=LENGTH,
        gradient_clip=None,
        optimizer=ADAMW,
        schedule=WarmupCosine(learning_rate=RATE, warmup_steps=0, total_steps=10**9),
        precision=DOUBLE,
        data_parallel=DataParallelConfig(form=form),
    )
    model = build(
        lambda: Toy(MODEL),
        topology,
        plan(MODEL),
        head=HEAD,
        tail=TAIL,
        precision=config.precision,
        data_parallel=config.data_parallel,
    )
    model.initialise(rule, SEED)
    runner = make_runner(
        model,
        config.pipeline,
        num_microbatches=config.num_microbatches(topology.size("dp"), 1),
        microbatch_size=microbatch_size,
        sequence_length=LENGTH,
        hidden_size=MODEL.hidden_size,
        vocab_size=MODEL.vocab_size,
        dtype=torch.float64,
    )
    return Trainer(config, model, runner, Data(topology))


Result = tuple[list[float], list[float], dict[str, Tensor]]


def by_hand() -> Result:
    """Plain torch, whose cross entropy is the mean over the valid tokens of the whole batch."""
    model = plain_model(MODEL)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=ADAMW.betas, eps=ADAMW.eps, weight_decay=0.0
    )
    losses, norms = [], []
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def of_own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Instead of the count over all ranks."""
    return x if axis.name == "dp-cp" else sum_over(x, axis)


def error(topology: Topology, form: Form, microbatch_size: int, reference: Result) -> float:
    """Largest relative error of losses, norms and parameters on this rank."""
    losses, norms, parameters = reference
    job = trainer(topology, form, microbatch_size)
    told: list[tuple[float, float]] = []
    job.report = lambda _, found: told.append((found["loss"], found["grad_norm"]))
    for _ in range(STEPS):
        job.train_step()
    pairs = zip(told, zip(losses, norms, strict=True), strict=False)
    found = [abs(a / b - 1) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
    for piece in job.pieces:
        whole = parameters[piece.name]
        if piece.box.numel:
            away = (piece.tensor - whole[piece.box.slices]).abs().max().item()
            found.append(away / whole.abs().max().item())
    return max(found)


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float]]:
    """Of every rank, for each form and for the two ways of getting it wrong."""
    reference = by_hand()

    def on_a_rank() -> dict[str, float]:
        topology = Topology(Layout(4, cp=2))
        found = {form: error(topology, form, 2, reference) for form in FORMS}
        found["accumulated"] = error(topology, "zero1", 1, reference)
        with patch.object(loop, "sum_over", of_own_tokens):
            found["own tokens"] = error(topology, "zero1", 2, reference)
        with patch.object(Trainer, "_count", count_all):
            found["all tokens"] = error(topology, "zero1", 2, reference)
        return found

    return launch(on_a_rank, 4, timeout=300)


count_all: Callable[[Trainer, Tensor], Tensor] = lambda _, x: torch.ones_like(x).sum().double()  # noqa: E731


@pytest.mark.parametrize("name", [*FORMS, "accumulated"])
def test_every_valid_token_weighs_the_same(errors: list[dict[str, float]], name: str) -> None:
    assert max(rank[name] for rank in errors) < 1e-12


@pytest.mark.parametrize("name", ["own tokens", "all tokens"])
def test_another_divisor_is_noticed(errors: list[dict[str, float]], name: str) -> None:
    assert max(rank[name] for rank in errors) > 1e-3


def test_the_batches_have_ranks_without_valid_tokens() -> None:
    counts = []
    for step in range(STEPS):
        parts = [half for rows in batch(step)[1].chunk(2) for half in rows.chunk(2, 1)]
        counts.append([int((part != -100).sum()) for part in parts])
    assert counts == [[4, 0, 8, 5], [0, 0, 8, 5]]
